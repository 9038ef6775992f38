"""What a child process of sorahpc.data.isolate answers when it is asked about an open file."""

from __future__ import annotations

import math
import traceback
from dataclasses import asdict
from typing import IO, Any

import numpy as np

from sorahpc.data import measures
from sorahpc.data.container import Unusable
from sorahpc.data.dali import decode_dali, is_spent
from sorahpc.data.frames import ClipPlan, decode, measure, probe


def serve(request: dict[str, Any], file: IO[bytes], memory: Any) -> dict[str, Any]:
    """Serve a request: `what` is "probe", "measure" or "decode".

    Returns:
        for JSON: {"found": fields of Probe}; {"done": True, "clips": N, "frames": of the video, "too_short": scenes
        that were left out} with CLIP [N] at the start of `memory`; {"done": True, "by": who decoded, "refusal": why it
        was not DALI, "last": whether this process is better ended} with the pixels at the start of `memory`; or
        {"unusable": reason}, with "trace" for an exception that nobody foresaw.

    Raises:
        MemoryError.
    """
    try:
        if request["what"] == "probe":
            return {"found": asdict(probe(file))}
        if request["what"] == "measure":
            scenes = measures.Scenes(request["threshold"], request["min_s"])
            clips = measure(file, request["height"], request["width"], scenes)
            if len(clips) > request["most"]:
                raise Unusable(f"too many scenes: {len(clips)}, more than its length allows")
            np.frombuffer(memory, measures.CLIP, len(clips))[:] = clips
            return {"done": True, "clips": len(clips), "frames": scenes.frames, "too_short": scenes.too_short}
        plan = ClipPlan(tuple(request["times_s"]), request["height"], request["width"])
        shape = (len(plan.times_s), plan.height, plan.width, 3)
        clip = np.frombuffer(memory, np.uint8, math.prod(shape)).reshape(shape)
        refusal = ""
        if request["by"] == "dali":
            try:
                decode_dali(file, plan, clip, request["gpu"])
                return {"done": True, "by": "dali", "last": is_spent()}
            except Unusable as error:
                refusal = str(error)
        decode(file, plan, clip)
        return {"done": True, "by": "pyav", "refusal": refusal, "last": is_spent()}
    except Unusable as error:
        return {"unusable": str(error)}
    except MemoryError:
        raise
    except Exception as error:  # a hole in our handling of broken files; it must not cost the other files
        text = " ".join(str(error).split())[:500]
        return {"unusable": f"unexpected: {type(error).__name__}: {text}", "trace": traceback.format_exc()[-4000:]}
