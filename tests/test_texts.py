"""T5 and CLIP, a caption and a detailed one: from the encoders through cache, training and checkpoint to a sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import write_clip, write_t5, write_vae

from sorahpc.config import Config
from sorahpc.configfile import parse_config
from sorahpc.data.cache import build_index
from sorahpc.data.captions import CAPTIONS, Row, caption_settings, write_captions
from sorahpc.data.latents import LatentCache
from sorahpc.data.manifest import MANIFEST, read_manifest
from sorahpc.data.seal import crc32, seal_of
from sorahpc.data.texts import TEXTS, join_texts
from sorahpc.data.toyworld import write_world
from sorahpc.errors import CheckpointError, DataError
from sorahpc.jobs import encode, prepare, sample, train
from sorahpc.models.text import load_texts
from sorahpc.runs import Task


def configure(root: Path, run: str = "r", **sections: Any) -> Config:
    text = {"path": str(root / "t5"), "max_tokens": 32, "clip": {"path": str(root / "clip")}}
    data: dict[str, Any] = {
        "run": run, "runs_dir": str(root / "runs"), "prepare": {"videos": str(root / "videos")},
        "clip": {"fps": 8, "max_frames": 5, "max_area_px": 1024}, "vae": {"path": str(root / "vae")}, "text": text,
        "caption": {"path": "unused", "frames": 0}, "encode": {"cache": str(root / "cache"), "clips_per_shard": 3},
        "model": {"depth": 1, "dim": 32, "num_heads": 2},
        "train": {"steps": 2, "tokens_per_pack": 64, "warmup_steps": 0, "save_every": 100, "text_drop": 0.0},
        "sample": {"prompts": str(root / "prompts.jsonl"), "frames": 5, "height": 32, "width": 32, "steps": 2,
                   "out": str(root / "samples" / run)},
    }  # fmt: skip
    for name, value in sections.items():
        data[name] = {**data[name], **value} if isinstance(data.get(name), dict) and value is not None else value
    return parse_config({name: value for name, value in data.items() if value is not None})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of six clips, of which all but one have a detailed caption, and a short training on it."""
    root = tmp_path_factory.mktemp("texts")
    write_world(root / "videos", 6, seed=2)
    write_vae(root / "vae")
    write_t5(root / "t5", root / "videos")
    write_clip(root / "clip", [p.read_text() for p in sorted((root / "videos").glob("*.txt"))])
    (root / "prompts.jsonl").write_text(json.dumps({"prompt": "a red circle moves left"}))
    config = configure(root)
    prepare.run(config, Task(config.run_dir, "prepare"))
    videos = read_manifest(config.run_dir / MANIFEST)
    rows = [
        Row(v.key, f"in detail: {v.caption}" if i else "", "" if i else "refusal", "x") for i, v in enumerate(videos)
    ]
    write_captions(config.run_dir / CAPTIONS, rows, caption_settings(config))
    encode.run(config, Task(config.run_dir, "encode"))
    train.run(config, Task(config.run_dir, "train"))
    return root


def test_the_cache_holds_what_the_encoders_say_of_both_captions(world: Path) -> None:
    config = configure(world)
    assert config.text is not None
    cache, texts = LatentCache(config.cache_dir), load_texts(config.text)
    assert cache.dims == texts.dims == {"text": 16, "clip_text": 16, "clip_pooled": 16}
    assert cache.info["clip_text"]["id"] == "CLIPTextModel" and cache.info["clip_projected"] is False
    assert cache.detailed == ["", *(f"in detail: {text}" for text in cache.captions[1:])]
    for i in range(len(cache)):
        for second, said in ((False, cache.captions[i]), (True, cache.detailed[i] or cache.captions[i])):
            found, (expected,) = cache.read(i, second)[1], texts.encode([said])
            assert list(found) == list(TEXTS) and found["clip_pooled"].shape == (1, 16)
            assert all(torch.equal(found[name], expected[name].half().float()) for name in TEXTS), (i, second)
    (empty,) = texts.encode([""])
    assert all(torch.equal(cache.empty_texts[name], empty[name].half().float()) for name in TEXTS)


@pytest.mark.parametrize(("share", "drop"), [(0.0, 0.0), (1.0, 0.0), (0.5, 0.0), (1.0, 1.0)])
def test_training_sees_the_mix_that_it_asks_for(world: Path, share: float, drop: float) -> None:
    config = configure(world, train={"detailed_share": share, "text_drop": drop})
    cache = LatentCache(config.cache_dir)
    samples = [(i, visit) for visit in range(20) for i in range(1, len(cache))]
    pack = train.build_pack(cache, samples, config, cache.mean, cache.std, torch.device("cpu"))
    lengths = torch.tensor(pack.texts.text_lens).view(20, -1)
    short, long = (
        torch.tensor([len(cache.read(i, d)[1]["text"]) for i in range(1, len(cache))]) for d in (False, True)
    )
    assert (short < long).all()
    if drop:
        assert torch.equal(pack.texts.clip_pooled, cache.empty_texts["clip_pooled"].expand(len(samples), -1))
    elif share in (0.0, 1.0):
        assert (lengths == (long if share else short)).all()
        whole = join_texts([cache.read(i, bool(share))[1] for i, _ in samples])
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(pack.texts, whole, strict=True))
    else:
        chosen = (lengths == long).float()
        # 100 fair draws: within 3.5 standard deviations of a half; and no clip always the same.
        assert abs(chosen.mean() - 0.5) < 0.18 and (chosen.mean(0) > 0).all() and (chosen.mean(0) < 1).all()
    again = train.build_pack(cache, samples[::-1], config, cache.mean, cache.std, torch.device("cpu"))
    assert again.texts.text_lens == pack.texts.text_lens[::-1], "a function of seed, sample and visit alone"


def test_sampling_uses_both_encoders_and_refuses_others(world: Path) -> None:
    config = configure(world)
    sample.run(config, Task(config.run_dir, "sample"))
    sidecar = json.loads(next((world / "samples/r").glob("0*.json")).read_text())
    assert sidecar["clip_text"]["id"] == "CLIPTextModel" and sidecar["settings"]["clip_projected"] is False

    out = world / "samples/none"
    none = configure(world, text={"clip": None}, sample={"out": str(out)})
    with pytest.raises(CheckpointError, match=r"text\.clip: the checkpoint .* was trained with CLIP; name the encoder"):
        sample.run(none, Task(none.run_dir, "sample"))
    write_clip(world / "other", ["some other words"])
    other = configure(world, text={"clip": {"path": str(world / "other")}}, sample={"out": str(out)})
    with pytest.raises(CheckpointError, match=r"text\.clip\.path: .*other has weights_sha256 .*trained with"):
        sample.run(other, Task(other.run_dir, "sample"))


def test_a_cache_made_with_or_without_clip_is_refused_by_name_the_other_way_round(world: Path, tmp_path: Path) -> None:
    without = configure(world, text={"clip": None})
    with pytest.raises(DataError, match=r"field `clip_text`: expected null, found \{"):
        encode.run(without, Task(without.run_dir, "encode"))
    plain = configure(world, text={"clip": None}, encode={"cache": str(tmp_path / "plain")})
    encode.run(plain, Task(plain.run_dir, "encode"))
    with_clip = configure(world, encode={"cache": str(tmp_path / "plain")})
    with pytest.raises(DataError, match=r"field `clip_text\.id`: expected \"CLIPTextModel\", found null"):
        encode.run(with_clip, Task(with_clip.run_dir, "encode"))
    with pytest.raises(CheckpointError, match=r"CLIP text dim: the checkpoint .* has 16, this run 0"):
        train.run(plain, Task(plain.run_dir, "train"))
    projected = configure(world, text={"clip": {"path": str(world / "clip"), "projected": False}})
    encode.run(projected, Task(projected.run_dir, "encode"))  # the same said in words


def test_a_detailed_caption_without_its_embedding_is_no_shard_of_ours(world: Path, tmp_path: Path) -> None:
    import h5py

    config = configure(world, encode={"cache": str(tmp_path)})
    encode.run(config, Task(config.run_dir, "encode"))
    path = next(iter(sorted(tmp_path.glob("shard-*.h5"))))
    with h5py.File(path, "r+") as f:
        offsets = f["detailed_clip_text_offsets"][()]
        f["detailed_clip_text_offsets"][...] = np.minimum(offsets, offsets[1])
    data = path.read_bytes()  # HDF5 has cut the seal off
    path.write_bytes(data + seal_of(crc32(data)))
    with pytest.raises(DataError, match="`detailed_clip_text_offsets`: a caption without embedding, or the reverse"):
        build_index(tmp_path, [p.name for p in tmp_path.glob("shard-*.h5")])
