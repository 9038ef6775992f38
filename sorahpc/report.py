"""The report of a run: one HTML file that opens from disk, with its clips and charts inside it.

Everything comes from the files of the run folder. A part that a run does not have is one sentence in the page, not a
failure: a run is worth looking at while it still trains. Prompts and captions are strangers' texts: all text is
escaped, and the page's content policy forbids scripts and the network.
"""

from __future__ import annotations

import base64
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sorahpc.configfile import load_config
from sorahpc.errors import ConfigError, DataError
from sorahpc.page import esc, fact_table, line_chart, page, smooth
from sorahpc.runs import atomic_write

MAX_CLIPS = 96  # in the page; a browser decodes them all at once
MAX_MEDIA_BYTES = 48 << 20
JOBS = ("prepare", "caption", "encode", "train", "sample", "evaluate")
ASPECTS = ("visible", "colour", "shape", "direction")


def write_report(run_dir: Path) -> Path:
    """Write `report.html` of a run and return its path.

    Raises:
        DataError: `run_dir` is not a folder.
    """
    if not run_dir.is_dir():
        raise DataError(f"{run_dir}: no such run folder; expected runs/<name>")
    run = _Run(run_dir)
    sections = [
        ("Generated clips", _generated),
        ("Real clips and their VAE reconstructions", _reconstructions),
        ("Training", _training),
        ("Where time went", _timings),
        ("Configuration and versions", _provenance),
    ]
    body = [_header(run)]
    for title, make in sections:
        body.append(f"<section><h2>{esc(title)}</h2>\n{_part(make, run)}\n</section>")
    path = run_dir / "report.html"
    atomic_write(path, page(f"{run_dir.name} · SoraHPC report", "\n".join(body)))
    return path


class _Missing(Exception):
    """A part that this run does not have; its text is the sentence of the page."""


class _Run:
    """Reads of a run folder, and how many bytes of media the page has left."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.media_left = MAX_MEDIA_BYTES
        files = {job: path / "jobs" / job / "config.yaml" for job in JOBS}
        self.configs = {job: file for job, file in files.items() if file.is_file()}

    @property
    def samples_dir(self) -> Path:
        # The run folder may have moved since; what lies inside it is found inside it.
        config = load_config(self.configs["sample"]) if "sample" in self.configs else None
        return (config.sample.out if config and config.sample else None) or self.path / "samples"

    def json(self, path: Path, missing: str) -> Any:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise _Missing(missing) from None

    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl by step; a step that was run twice counts as it was last."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            raise _Missing("No training yet: there is no metrics.jsonl.")
        rows = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                rows[int(row["step"])] = row
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a run that writes at this moment
        if not rows:
            raise _Missing("No training step is logged in metrics.jsonl yet.")
        return [rows[step] for step in sorted(rows)]

    def video(self, path: Path, label: str) -> str:
        """A playing <video> of an mp4, as a data URI."""
        size = path.stat().st_size
        if size > self.media_left:
            return f'<p class="note">{esc(path.name)} is left out: the page would be too large.</p>'
        self.media_left -= size
        data = base64.b64encode(path.read_bytes()).decode()
        return (
            f'<video muted loop autoplay playsinline aria-label="{esc(label)}" '
            f'src="data:video/mp4;base64,{data}"></video>'
        )


def _part(make: Callable[[_Run], str], run: _Run) -> str:
    try:
        return make(run)
    except _Missing as missing:
        return f'<p class="note">{esc(missing)}</p>'
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        return f'<p class="note">This part can’t be shown: {esc(type(error).__name__)}: {esc(error)}</p>'


# ---------------------------------------------------------------------------------------------------------------------
# Sections


@dataclass(frozen=True)
class _Sample:
    name: str
    prompt: str
    mp4: Path
    sidecar: dict[str, Any]


def _samples(run: _Run) -> tuple[list[_Sample], int]:
    """Samples that exist, in the order of the prompts file, and how many it asks for."""
    folder = run.samples_dir
    index = run.json(folder / "prompts.json", "No samples yet: the job `sample` has not run.")
    found = []
    for entry in index["samples"]:
        name = Path(entry["name"]).name
        sidecar, mp4 = folder / f"{name}.json", folder / f"{name}.mp4"
        if sidecar.is_file() and mp4.is_file():
            found.append(_Sample(name, entry["prompt"], mp4, json.loads(sidecar.read_text(encoding="utf-8"))))
    return found, len(index["samples"])


def _judgements(run: _Run) -> dict[str, dict[str, Any]]:
    """Sample name -> judgement, where the run was judged (the toy world's is; other runs have no judge)."""
    path = run.samples_dir / "judgements.json"
    if not path.is_file():
        return {}
    return {entry["name"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))["samples"]}


def shares(judgements: Iterable[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """For each aspect: how many judged samples show what their prompt asked, and how many were judged."""
    rows = list(judgements)
    return {aspect: (sum(bool(row[aspect]["ok"]) for row in rows), len(rows)) for aspect in ASPECTS}


def _header(run: _Run) -> str:
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    tiles = _part(_tiles, run)
    return f"<header><h1>{esc(run.path.name)}</h1><p>SoraHPC report, written {written}</p>{tiles}</header>"


def _tiles(run: _Run) -> str:
    tiles: list[tuple[str, str, float | None]] = []  # label, figure, share for a bar
    try:
        judged = _judgements(run)
        rows = [judged[s.name] for s in _samples(run)[0] if s.name in judged] if judged else []
        for aspect, (good, count) in shares(rows).items() if rows else ():
            tiles.append((f"{aspect} as asked: {good} of {count}", f"{good / count:.0%}", good / count))
    except (_Missing, OSError, ValueError, KeyError, TypeError):
        pass  # the section below says what is wrong with the file
    try:
        rows = run.metrics()
        speed = _speed(rows)
        tiles.append(("training steps", f"{rows[-1]['step']:,}", None))
        tiles.append(("loss at the end", f"{_tail_mean([float(r['loss']) for r in rows]):.3f}", None))
        if speed:
            tiles.append(("tokens a second", f"{speed[1]:,.0f}", None))
    except _Missing:
        pass
    cells = []
    for label, figure, share in tiles:
        bar = f'<div class="bar"><span style="width:{share * 100:.1f}%"></span></div>' if share is not None else ""
        cells.append(f'<div class="tile"><b>{esc(figure)}</b><span>{esc(label)}</span>{bar}</div>')
    return f'<div class="tiles">{"".join(cells)}</div>' if cells else ""


def _generated(run: _Run) -> str:
    samples, asked = _samples(run)
    if not samples:
        raise _Missing(f"None of the {asked} samples is made yet.")
    judged = _judgements(run)
    shown = samples[:MAX_CLIPS]
    first = shown[0].sidecar
    settings = first["settings"]
    lines = [
        f"<p>{len(samples)} of {asked} prompts"
        + (f", the first {len(shown)} shown" if len(shown) < len(samples) else "")
        + f". Made from the averaged weights of step {esc(first['checkpoint']['step'])}, {esc(settings['steps'])} "
        f"Euler steps, guidance {esc(settings['cfg_scale'])}.</p>"
    ]
    rows = [judged[s.name] for s in samples if s.name in judged]
    if rows:
        figures = shares(rows)
        words = ", ".join(f"{aspect} {good} of {count}" for aspect, (good, count) in figures.items())
        lines.append(f"<p>Judged by code from the pixels of the mp4 files: {esc(words)}.</p>")
    else:
        lines.append('<p class="note">Not judged: a judge exists for the toy world’s prompts only.</p>')
    lines.append('<div class="clips">')
    for sample in shown:
        lines.append(
            f"<figure>{run.video(sample.mp4, sample.prompt)}<figcaption><bdi>{esc(_cut(sample.prompt))}</bdi>"
            f"{_chips(judged.get(sample.name))}<small>{esc(sample.name[:5])} · seed {esc(sample.sidecar['seed'])}"
            "</small></figcaption></figure>"
        )
    lines.append("</div>")
    return "\n".join(lines)


def _chips(judgement: dict[str, Any] | None) -> str:
    if judgement is None:
        return ""
    chips = []
    for aspect in ASPECTS:
        verdict = judgement[aspect]
        good, found = bool(verdict["ok"]), verdict.get("found")
        word = aspect if good or aspect == "visible" else f"{aspect}: {found or 'unclear'}"
        mark = "✓" if good else "✗"
        chips.append(f'<li class="{"yes" if good else "no"}"><span>{mark}</span> {esc(word)}</li>')
    return f'<ul class="chips">{"".join(chips)}</ul>'


def _reconstructions(run: _Run) -> str:
    folder = run.path / "reconstructions"
    data = run.json(folder / "reconstructions.json", "No reconstructions: the job `evaluate` has not run.")
    clips = data["clips"]
    if not clips:
        raise _Missing("evaluate.reconstructions is 0, or no cached clip has its video any more (see the log).")
    mean = f"mean PSNR {statistics.fmean(float(clip['psnr_db']) for clip in clips):.1f} dB"
    likeness = [float(clip["ssim"]) for clip in clips if clip.get("ssim") is not None]
    mean += f" and SSIM {statistics.fmean(likeness):.3f}" if likeness else ""
    lines = [
        "<p>What the model can show at best: the cached latents of training clips, decoded. "
        f"{esc(data['vae']['id'])}, {mean} over {len(clips)} clips.</p>",
        '<div class="clips pairs">',
    ]
    for clip in clips:
        real, again = folder / Path(clip["real"]).name, folder / Path(clip["reconstruction"]).name
        found = f"PSNR {float(clip['psnr_db']):.1f} dB"
        found += f", SSIM {float(clip['ssim']):.3f}" if clip.get("ssim") is not None else ""
        lines.append(
            f'<figure><div class="pair"><div>{run.video(real, "real: " + clip["caption"])}<small>real</small></div>'
            f"<div>{run.video(again, 'reconstruction: ' + clip['caption'])}<small>reconstruction</small></div></div>"
            f"<figcaption><bdi>{esc(_cut(clip['caption']))}</bdi><small>{found}</small>"
            "</figcaption></figure>"
        )
    lines.append("</div>")
    return "\n".join(lines)


def _training(run: _Run) -> str:
    rows = run.metrics()
    steps = [float(r["step"]) for r in rows]
    losses = [float(r["loss"]) for r in rows]
    out = ['<div class="charts">']
    out.append(
        line_chart(
            "Loss", steps, [("logged step", losses, "thin"), ("smoothed", smooth(losses), "bold")], "step",
            "mean squared error of the velocity",
        )
    )  # fmt: skip
    timed = [r for r in rows if "step_s" in r]
    if timed:
        seconds = [float(r["step_s"]) for r in timed]
        at = [float(r["step"]) for r in timed]
        out.append(line_chart("Time a step", at, [("logged step", seconds, "bold")], "step", "seconds", robust=True))
    out.append("</div>")
    facts = [("steps", f"{rows[-1]['step']:,}"), ("loss, first logged", f"{losses[0]:.3f}")]
    facts.append(("loss, mean of the last tenth", f"{_tail_mean(losses):.3f}"))
    speed = _speed(rows)
    if speed:
        facts += [("median seconds a step", f"{speed[0]:.3f}"), ("median tokens a second", f"{speed[1]:,.0f}")]
    if "samples" in rows[-1]:
        clips = [float(r["samples"]) for r in rows if "samples" in r]
        facts.append(("mean clips a step", f"{statistics.fmean(clips):.1f}"))
    if "consumed" in rows[-1]:
        facts.append(("clips seen", f"{rows[-1]['consumed']:,}"))
    return "\n".join(out) + fact_table(facts)


def _speed(rows: list[dict[str, Any]]) -> tuple[float, float] | None:
    """Median (seconds a step, tokens a second), without the first step, which warms caches up."""
    timed = [r for r in rows if "step_s" in r and "tokens" in r and float(r["step_s"]) > 0]
    timed = timed[1:] or timed
    if not timed:
        return None
    seconds = statistics.median(float(r["step_s"]) for r in timed)
    return seconds, statistics.median(float(r["tokens"]) / float(r["step_s"]) for r in timed)


def _tail_mean(values: Sequence[float]) -> float:
    return statistics.fmean(values[-max(1, len(values) // 10) :])


def _timings(run: _Run) -> str:
    data = run.json(run.path / "timings.json", "No timings.json: it is written by `sorahpc demo`.")
    stages = [(str(s["name"]), float(s["seconds"])) for s in data["stages"]]
    total = sum(seconds for _, seconds in stages)
    if not total > 0:
        raise _Missing("No stage has run yet.")
    rows = "".join(
        f'<tr><th scope="row">{esc(name)}</th><td>{_duration(seconds)}</td><td class="wide"><div class="bar">'
        f'<span style="width:{seconds / total * 100:.1f}%"></span></div></td><td>{seconds / total:.0%}</td></tr>'
        for name, seconds in stages
    )
    note = esc(data["note"]) if "note" in data else ""
    return f'<p>{_duration(total)} in all. {note}</p><table class="time">{rows}</table>'


def _provenance(run: _Run) -> str:
    out = []
    try:
        samples, _ = _samples(run)
    except _Missing:
        samples = []
    if samples:
        s = samples[0].sidecar
        facts = [("checkpoint", f"{s['checkpoint']['path']} (step {s['checkpoint']['step']})")]
        facts.append(("checkpoint manifest, sha256", s["checkpoint"]["manifest_sha256"]))
        for name, part in (("VAE", s["vae"]), ("text encoder", s["text"])):
            facts.append((name, f"{part['id']}, weights sha256 {part['weights_sha256'][:16]}…"))
        facts.append(("sampled on", s["device"]))
        facts += [(package, version) for package, version in s["versions"].items()]
        out.append(fact_table(facts))
    for job, file in run.configs.items():  # each job keeps what it ran with, and they may differ
        text = esc(file.read_text(encoding="utf-8"))
        out.append(f"<details><summary>Resolved configuration of {job}</summary><pre>{text}</pre></details>")
    if not out:
        raise _Missing("No job of this run has been started.")
    return "\n".join(out)


def _cut(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 90 else f"{int(seconds // 60)} min {int(seconds % 60)} s"
