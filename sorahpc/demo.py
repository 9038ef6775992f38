"""`sorahpc demo`: the pipeline on the toy world, as a user would run it, through the same jobs and the same launcher.

It only adds what a user brings along: videos with captions, a text encoder, prompts. Then prepare, encode, train and
sample run as the command line runs them; evaluate judges the samples, and the report is written. Run again, each
stage finds its work on disk and does what is missing. No torch at import.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sorahpc.cluster.launch import describe_job, launch, pipeline_jobs, wait_for_slurm
from sorahpc.config import Config
from sorahpc.configfile import load_config
from sorahpc.data.toyworld import COLOURS, DIRECTIONS, SHAPES, SIZES, SPEEDS
from sorahpc.errors import CheckpointError, DataError
from sorahpc.log import Progress, duration
from sorahpc.report import ASPECTS, shares, write_report
from sorahpc.runs import Task, atomic_write, read_json, write_json

# height x width of the prompts: every other one square, as in the world
PROMPT_SIZES = ((64, 64), (48, 80), (64, 64), (80, 48))


def main(config: str = "demo", overrides: Sequence[str] = (), cluster: str | None = None) -> int:
    """Run the demo and print its summary. Returns the exit code of the first job that failed, else 0.

    Raises:
        SoraHPCError: as the jobs and the launcher do.
    """
    cfg = load_config(config, list(overrides), cluster=cluster)
    cfg.need("demo", "prepare", "vae", "text", "model", "train", "sample")
    timings = Timings(cfg.run_dir / "timings.json")
    made: list[tuple[str, Callable[[Config], None]]] = [
        ("videos", make_videos),
        ("text encoder", make_text_encoder),
        ("prompts", make_prompts),
    ]
    jobs = [*pipeline_jobs(cfg), describe_job("evaluate")]
    count = len(made) + len(jobs) + 1
    numbers = itertools.count(1)
    started = time.monotonic()

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[None]:
        print(f"[{next(numbers)}/{count}] {name}", file=sys.stderr, flush=True)
        with timings.stage(name):
            yield

    for name, make in made:
        with stage(name):
            make(cfg)
    for job in jobs:
        with stage(job.name):
            code, job_id = launch(cfg, job)
            if job_id is not None:  # on Slurm a launch returns at once, and each stage needs the one before
                code = wait_for_slurm(cfg, job, job_id, progress=True)
        if code in (DataError.exit_code, CheckpointError.exit_code):  # what it refuses, the demo made
            advice = "delete it, or name another run: sorahpc demo run=NAME"
            print(f"sorahpc: demo: {cfg.run_dir} may be of a demo with other settings: {advice}", file=sys.stderr)
        if code:
            return code
    with stage("report"):
        report = write_report(cfg.run_dir)
    print(summary(cfg, report, timings, time.monotonic() - started))
    return 0


class Timings:
    """`timings.json`: seconds a stage over all runs of the demo, so that a resumed one still says where time went."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = read_json(path) or {}
        self.seconds: dict[str, float] = {s["name"]: float(s["seconds"]) for s in data.get("stages", [])}
        self.last: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.last[name] = time.monotonic() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + self.last[name]
            stages = [{"name": n, "seconds": s, "last_s": self.last.get(n)} for n, s in self.seconds.items()]
            note = "Seconds of each stage, summed over all runs of the demo in this folder."
            write_json(self.path, {"note": note, "cpus": os.cpu_count(), "stages": stages})


# ---------------------------------------------------------------------------------------------------------------------
# What a user would bring along


def make_videos(config: Config) -> None:
    """Render the toy world into `prepare.videos`; clips that exist are kept."""
    from sorahpc.data.toyworld import write_world

    assert config.demo is not None and config.prepare is not None
    task = Task(config.run_dir, "videos")
    with Progress(task.folder):
        write_world(
            config.prepare.videos,
            config.demo.clips,
            config.demo.seed,
            fps=config.clip.fps,
            workers=os.cpu_count() or 1,
            progress=lambda done, total: task.report(done, total, "video"),
        )


def make_text_encoder(config: Config) -> None:
    """Write a tiny T5 and its tokenizer, trained on the captions, into `text.path`; one that exists is kept."""
    assert config.demo is not None and config.prepare is not None and config.text is not None
    if (config.text.path / "config.json").is_file():
        return
    from sorahpc.models.text import make_tiny_t5

    captions = [path.read_text(encoding="utf-8") for path in sorted(config.prepare.videos.glob("*.txt"))]
    make_tiny_t5(config.text.path, captions, config.demo.text_dim, config.demo.seed)


def make_prompts(config: Config) -> None:
    """Write the prompts as JSONL into `sample.prompts`; a file that exists is kept (edit it, and run again)."""
    assert config.demo is not None and config.sample is not None
    if config.sample.prompts.exists():
        return
    lines = []
    for i, text in enumerate(prompts(config.demo.prompts)):
        height, width = PROMPT_SIZES[i % len(PROMPT_SIZES)]
        lines.append(json.dumps({"prompt": text, "height": height, "width": width}))
    atomic_write(config.sample.prompts, "\n".join(lines) + "\n")


def prompts(count: int) -> list[str]:
    """Captions of the toy world without bounce or bar; any 72 hold each combination of colour, shape and direction."""
    colours, shapes, directions = list(COLOURS), list(SHAPES), list(DIRECTIONS)
    sizes, speeds = list(SIZES), list(SPEEDS)
    out = []
    for i in range(count):
        colour = colours[i % 6]
        shape = shapes[(i + i // 6) % 3]
        direction = directions[(i % 6 + i // 6 % 3 + i // 18) % 4]
        out.append(f"a {sizes[i // 3 % 2]} {colour} {shape} moves {direction} {speeds[i // 2 % 2]}")
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Summary


def figures(config: Config) -> dict[str, Any]:
    """The demo's figures as plain data: judged shares, PSNR of the VAE, the last logged training step."""
    judged = json.loads((config.samples_dir / "judgements.json").read_text(encoding="utf-8"))["samples"]
    folder = config.run_dir / "reconstructions"
    pairs = json.loads((folder / "reconstructions.json").read_text(encoding="utf-8"))["clips"]
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    tail = rows[-max(1, len(rows) // 10) :]
    return {
        "samples": len(judged),
        **{aspect: good for aspect, (good, _) in shares(judged).items()},
        "psnr_db": sum(c["psnr_db"] for c in pairs) / len(pairs) if pairs else None,
        "steps": rows[-1]["step"],
        "loss": sum(r["loss"] for r in tail) / len(tail),
        "step_s": sorted(r["step_s"] for r in rows)[len(rows) // 2],
    }


def summary(config: Config, report: Path, timings: Timings, seconds: float) -> str:
    """What the demo prints at its end."""
    f = figures(config)
    count = f["samples"]
    lines = ["", f"{count} prompts sampled; what they asked for and the pixels show:"]
    lines += [f"  {aspect:<10} {f[aspect]:3d} of {count} ({f[aspect] / max(count, 1):.0%})" for aspect in ASPECTS]
    lines.append(f"training: {f['steps']} steps, loss {f['loss']:.3f} at the end, {f['step_s']:.2f} s a step")
    if f["psnr_db"] is not None:
        lines.append(f"VAE: {f['psnr_db']:.1f} dB PSNR on training clips")
    lines.append("time: " + ", ".join(f"{name} {duration(s)}" for name, s in timings.last.items() if s >= 0.5))
    lines.append(f"      {duration(seconds)} in all")
    lines.append(f"report: {report.absolute()}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main(overrides=sys.argv[1:]))
