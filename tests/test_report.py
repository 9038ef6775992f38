"""The report: whole runs, half runs, hostile prompts, and a real browser where there is one."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from sorahpc.data.mp4 import write_mp4
from sorahpc.errors import DataError
from sorahpc.page import line_chart, smooth, ticks
from sorahpc.report import shares, write_report

HOSTILE = "</figcaption><script>document.title='owned'</script><img src=x onerror=alert(1)> \u202e\"' & {0}"


def clip(i: int, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    frames = np.full((9, *size, 3), 90, np.uint8)
    for t in range(9):
        frames[t, 20:40, 4 * t : 4 * t + 20] = [(220, 40, 40), (40, 60, 230), (30, 190, 50)][i % 3]
    return frames


def verdict(ok: bool, found: str = "blue") -> dict[str, object]:
    return {"ok": ok, "asked": "red", "found": "red" if ok else found}


def make_run(folder: Path, *, num_samples: int = 6, judged: bool = True) -> Path:
    """A run folder with every part a report shows."""
    samples = folder / "samples"
    index, judgements = [], []
    for i in range(num_samples):
        prompt = HOSTILE if i == 1 else f"a large red circle moves right, number {i}"
        name = f"{i:05d}-a-red-circle"
        index.append({"name": name, "prompt": prompt})
        write_mp4(samples / f"{name}.mp4", clip(i, (48, 80) if i == 2 else (64, 64)), 8.0)
        sidecar = {
            "prompt": prompt, "seed": 0, "device": "cpu", "versions": {"torch": "2.13.0+cpu"},
            "settings": {"steps": 25, "cfg_scale": 3.0},
            "checkpoint": {"path": "runs/x/checkpoints/step-00000400", "step": 400, "manifest_sha256": "ab" * 32},
            "vae": {"id": "AutoencoderKLWan", "weights_sha256": "cd" * 32},
            "text": {"id": "T5EncoderModel", "weights_sha256": "ef" * 32},
        }  # fmt: skip
        (samples / f"{name}.json").write_text(json.dumps(sidecar))
        judgements.append(
            {"name": name, "visible": verdict(i != 3), "colour": verdict(i % 2 == 0), "shape": verdict(True),
             "direction": verdict(i < 2, found="None")}
        )  # fmt: skip
    (samples / "prompts.json").write_text(json.dumps({"prompts_file": "p.txt", "samples": index}))
    if judged:
        (samples / "judgements.json").write_text(json.dumps({"samples": judgements}))
    rows = []
    for step in range(1, 801):
        loss = 0.2 + 0.8 * math.exp(-step / 120) + 0.05 * math.sin(step * 1.7)
        step_s = 3.0 if step == 1 else 0.25 + 0.02 * math.sin(step)
        row = {"step": step, "loss": loss, "step_s": step_s, "tokens": 2048, "samples": 32, "consumed": 32 * step}
        rows.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 801, "lo')
    pairs = folder / "reconstructions"
    entries = []
    for i in range(3):
        write_mp4(pairs / f"{i}.real.mp4", clip(i), 8.0)
        write_mp4(pairs / f"{i}.vae.mp4", clip(i) // 2 + 40, 8.0)
        entries.append(
            {"caption": HOSTILE, "real": f"{i}.real.mp4", "reconstruction": f"{i}.vae.mp4", "psnr_db": 30.0 + i,
             **({"ssim": 0.5 + i / 4} if i else {})}  # written before there was SSIM, or of clips too small for it
        )  # fmt: skip
    vae = {"id": "AutoencoderKLWan", "weights_sha256": "cd" * 32}
    (pairs / "reconstructions.json").write_text(json.dumps({"vae": vae, "clips": entries}))
    stages = [{"name": n, "seconds": s} for n, s in (("videos", 12.0), ("encode", 40.0), ("train", 260.0))]
    (folder / "timings.json").write_text(json.dumps({"stages": stages}))
    job = folder / "jobs" / "sample"
    job.mkdir(parents=True)
    (job / "config.yaml").write_text(yaml.safe_dump({"run": folder.name, "sample": {"prompts": "<b>.txt"}}))
    return folder


class Reader(HTMLParser):
    """Checks that elements nest, and collects them."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.stack or self.stack[-1] != "style":
            self.text += data


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert not reader.stack
    return reader


def test_a_whole_run_is_one_page_with_every_clip_inside_and_nothing_fetched(tmp_path: Path) -> None:
    page = read(write_report(make_run(tmp_path / "run")))
    videos = [attrs for tag, attrs in page.tags if tag == "video"]
    assert len(videos) == 6 + 2 * 3
    for attrs in videos:
        assert (attrs["src"] or "").startswith("data:video/mp4;base64,")
        assert {"muted", "loop", "autoplay", "playsinline"} <= set(attrs)
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "img", "object")
        assert not {"href", "srcset", "onload", "onerror"} & set(attrs)
    policy = next(a["content"] or "" for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy and "script" not in policy


def test_each_job_is_shown_with_the_configuration_that_it_ran_with(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    job = folder / "jobs" / "train"
    job.mkdir(parents=True)
    train = {"steps": 200, "tokens_per_pack": 9, "optimizer": "muon"}
    (job / "config.yaml").write_text(yaml.safe_dump({"run": folder.name, "train": train}))
    (folder / "jobs/encode").mkdir()
    (folder / "jobs/encode/config.yaml").write_text("of: another version\n")
    page = read(write_report(folder)).text
    encoded, trained, sampled = page.split("Resolved configuration of ")[1:]
    assert encoded.startswith("encode") and "of: another version" in encoded
    assert trained.startswith("train") and "optimizer: muon" in trained and "steps: 200" in trained
    assert sampled.startswith("sample") and "optimizer" not in sampled and "<b>.txt" in sampled


def test_prompts_and_captions_are_text_and_never_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = read(write_report(run))
    assert page.text.count(HOSTILE) == 1 + 3, "shown literally: once as a prompt, three times as a caption"
    assert "<script" not in (run / "report.html").read_text()


def test_the_figures_are_counted_from_the_judgements(tmp_path: Path) -> None:
    text = read(write_report(make_run(tmp_path / "run"))).text
    psnr = ("PSNR 31.0 dB and SSIM 0.875", "PSNR 32.0 dB, SSIM 1.000", "PSNR 30.0 dB")
    for words in ("visible 5 of 6", "colour 3 of 6", "shape 6 of 6", "direction 2 of 6", *psnr):
        assert words in text
    assert "colour: blue" in text, "a wrong verdict says what was found"
    assert "visible as asked: 5 of 6" in text and "83%" in text
    assert "5 min 12 s in all" in text


def test_speed_leaves_out_the_first_step_and_the_cut_line_is_skipped(tmp_path: Path) -> None:
    text = read(write_report(make_run(tmp_path / "run"))).text
    assert "0.250" in text and re.search(r"8,\d{3}", text) and "801" not in text


@pytest.mark.parametrize("missing", ["samples", "metrics.jsonl", "reconstructions", "timings.json", "jobs"])
def test_a_missing_part_is_a_sentence_and_the_rest_stays(tmp_path: Path, missing: str) -> None:
    run = make_run(tmp_path / "run", num_samples=2)
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = read(write_report(run))
    notes = sum(1 for tag, attrs in page.tags if attrs.get("class") == "note")
    assert notes == (0 if missing == "jobs" else 1)
    assert sum(1 for tag, _ in page.tags if tag == "section") == 5


def test_an_empty_run_folder_gives_a_page_of_sentences(tmp_path: Path) -> None:
    page = read(write_report(tmp_path))
    assert sum(1 for _, attrs in page.tags if attrs.get("class") == "note") == 5


def test_a_run_without_a_judge_shows_its_clips_without_verdicts(tmp_path: Path) -> None:
    page = read(write_report(make_run(tmp_path / "run", judged=False)))
    assert "Not judged" in page.text and "✗" not in page.text
    assert sum(1 for tag, _ in page.tags if tag == "video") == 12


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("samples/prompts.json", "[]"),
        ("samples/prompts.json", "{"),
        ("samples/judgements.json", '{"samples": [{"nam": 3}]}'),
        ("metrics.jsonl", '{"step": 1, "loss": "x"}\n'),
        ("metrics.jsonl", "\n\n"),
        ("timings.json", '{"stages": [{"name": "a", "seconds": 0}]}'),
        ("reconstructions/reconstructions.json", '{"vae": {}, "clips": [{}]}'),
    ],
)
def test_a_broken_file_spoils_its_part_only(tmp_path: Path, name: str, content: str) -> None:
    run = make_run(tmp_path / "run", num_samples=2)
    (run / name).write_text(content)
    page = read(write_report(run))
    assert any(attrs.get("class") == "note" for _, attrs in page.tags)
    assert sum(1 for tag, _ in page.tags if tag == "section") == 5


def test_names_in_the_index_can_not_reach_outside_the_samples_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_samples=1)
    write_mp4(tmp_path / "secret.mp4", clip(0), 8.0)
    (tmp_path / "secret.json").write_text((run / "samples" / "00000-a-red-circle.json").read_text())
    (run / "samples" / "prompts.json").write_text(json.dumps({"samples": [{"name": "../../secret", "prompt": "p"}]}))
    assert "None of the 1 samples is made yet" in read(write_report(run)).text


def test_samples_that_are_not_made_yet_are_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    next((run / "samples").glob("00004*.mp4")).unlink()
    assert "5 of 6 prompts" in read(write_report(run)).text


def test_a_run_that_does_not_exist_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run folder"):
        write_report(tmp_path / "none")


def test_shares_count_each_aspect() -> None:
    row = {a: {"ok": a != "shape"} for a in ("visible", "colour", "shape", "direction")}
    assert shares([row, row]) == {"visible": (2, 2), "colour": (2, 2), "shape": (0, 2), "direction": (2, 2)}


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 0.0031), (3, 3), (0, 0), (-5, 12), (0, 1e9), (1e-9, 2e-9), (999_999, 1_000_000)]
)
def test_ticks_are_few_round_and_cover_the_range(low: float, high: float) -> None:
    t = ticks(low, high)
    assert 2 <= len(t) <= 12 and t == sorted(set(t))
    assert t[0] <= low + 1e-12 and t[-1] >= high - 1e-9 * abs(high)


def test_smoothing_keeps_a_constant_and_a_line() -> None:
    assert smooth([2.0] * 50) == [2.0] * 50
    line = [float(i) for i in range(50)]
    assert smooth(line) == pytest.approx(line)
    assert smooth([1.0]) == [1.0]


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([1.0], [0.5]),
        ([1.0, 2.0], [0.0, 0.0]),
        ([1.0, 2.0, 3.0], [1.0, math.nan, 2.0]),
        ([float(i) for i in range(5000)], [1e6 * (i % 7) for i in range(5000)]),
        ([10.0, 20.0], [-3.0, 4.0]),
    ],
)
def test_a_chart_is_well_formed_svg_within_its_frame(x: list[float], y: list[float]) -> None:
    chart = line_chart("<Loss>", x, [("a", y, "thin"), ("b", y, "bold")], "step", "loss & more")
    figure = ElementTree.fromstring(chart)
    svg = figure.find("svg")
    assert svg is not None
    for path in svg.iter("path"):
        numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.get("d") or "")]
        assert all(-1 <= n <= 721 for n in numbers)
        assert len(numbers) <= 1300


def test_a_chart_without_a_finite_value_says_so() -> None:
    assert "no finite value" in line_chart("Loss", [1.0], [("a", [math.nan], "bold")], "step", "loss")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the program chromium (apt-get install chromium)")
def test_a_browser_renders_the_page_and_runs_no_script(tmp_path: Path) -> None:
    report = write_report(make_run(tmp_path / "run"))
    shot = tmp_path / "page.png"
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        "--disable-dev-shm-usage", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}",
    ]  # fmt: skip
    subprocess.run(
        [*command, "--window-size=1200,1600", "--virtual-time-budget=3000", f"--screenshot={shot}", report.as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert shot.stat().st_size > 30_000
    dom = subprocess.run(
        [*command, "--dump-dom", report.as_uri()], check=True, capture_output=True, timeout=120, text=True
    ).stdout
    assert "<title>run · SoraHPC report</title>" in dom, "no prompt changed the title"
