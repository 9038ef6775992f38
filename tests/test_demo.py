"""The demo's own parts; the whole of it is `make demo`."""

from __future__ import annotations

import collections
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sorahpc import demo
from sorahpc.cluster.launch import Job
from sorahpc.config import Config
from sorahpc.configfile import load_config
from sorahpc.data.toyworld import COLOURS, DIRECTIONS, SHAPES, parse_caption
from sorahpc.errors import DataError
from sorahpc.report import ASPECTS


def test_importing_the_demo_loads_no_torch() -> None:
    code = "import sys, sorahpc.demo; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_prompts_are_distinct_captions_with_every_word_equally_often() -> None:
    config = load_config("demo")
    assert config.demo is not None and config.demo.prompts >= 32
    texts = demo.prompts(config.demo.prompts)
    words = [parse_caption(text) for text in texts]
    assert len(set(texts)) == len(texts)
    for aspect, values in (("colour", COLOURS), ("shape", SHAPES), ("direction", DIRECTIONS)):
        counts = collections.Counter(w[aspect] for w in words)
        assert set(counts) == set(values) and len(set(counts.values())) == 1, aspect
    assert not any(w["bounce"] or w["occluder"] for w in words)


def test_prompts_of_a_former_run_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    config = load_config("demo", [f"sample.prompts={path}", "demo.prompts=3"])
    demo.make_prompts(config)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["height"], line["width"]) for line in lines] == [(64, 64), (48, 80), (64, 64)]
    path.write_text('{"prompt": "mine"}\n')
    demo.make_prompts(config)
    assert path.read_text() == '{"prompt": "mine"}\n'


def test_every_job_of_it_has_its_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("make_videos", "make_text_encoder", "make_prompts", "write_report"):
        monkeypatch.setattr(demo, name, lambda config: None)
    monkeypatch.setattr(demo, "summary", lambda *_: "")
    done = []

    def launch(config: Config, job: Job) -> tuple[int, None]:
        config.need(*job.sections)
        done.append(job.name)
        return 0, None

    monkeypatch.setattr(demo, "launch", launch)
    assert demo.main(overrides=[f"runs_dir={tmp_path}"]) == 0
    assert done == ["prepare", "encode", "train", "sample", "evaluate"]


@pytest.mark.parametrize(("code", "helps"), [(4, True), (5, True), (3, False), (10, False)])
def test_a_job_that_refuses_what_an_older_demo_left_is_followed_by_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, helps: bool
) -> None:
    for name in ("make_videos", "make_text_encoder", "make_prompts"):
        monkeypatch.setattr(demo, name, lambda config: None)
    monkeypatch.setattr(demo, "launch", lambda config, job: (code, None))
    assert demo.main(overrides=[f"runs_dir={tmp_path}"]) == code
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sorahpc: demo: ")]
    advice = f"{tmp_path}/demo may be of a demo with other settings: delete it, or name another run: "
    assert told == ([f"sorahpc: demo: {advice}sorahpc demo run=NAME"] if helps else [])


def test_a_world_of_another_seed_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "scenes.jsonl").write_text('{"of": "an older version"}\n')
    config = load_config("demo", [f"runs_dir={tmp_path}", f"prepare.videos={tmp_path}", "demo.clips=1"])
    with pytest.raises(DataError, match=r"another world .*; delete the folder, or choose another"):
        demo.make_videos(config)


def test_timings_add_up_over_runs_and_are_kept_when_a_stage_fails(tmp_path: Path) -> None:
    path = tmp_path / "timings.json"
    with demo.Timings(path).stage("a"):
        pass
    again = demo.Timings(path)
    again.seconds["a"] = 5.0
    with pytest.raises(RuntimeError), again.stage("b"):
        raise RuntimeError
    with again.stage("a"):
        pass
    stages = {s["name"]: s for s in json.loads(path.read_text())["stages"]}
    assert list(stages) == ["a", "b"] and 5.0 <= stages["a"]["seconds"] < 6.0


def test_the_summary_counts_every_aspect_and_names_the_report(tmp_path: Path) -> None:
    config = load_config("demo", [f"runs_dir={tmp_path}"])
    run = config.run_dir
    (run / "samples").mkdir(parents=True)
    (run / "reconstructions").mkdir()
    rows = [{"name": str(i), **{a: {"ok": a != "direction" or i == 0} for a in ASPECTS}} for i in range(4)]
    (run / "samples" / "judgements.json").write_text(json.dumps({"samples": rows}))
    (run / "reconstructions" / "reconstructions.json").write_text(json.dumps({"clips": [{"psnr_db": 31.0}]}))
    lines = [json.dumps({"step": i, "loss": 1 / i, "step_s": 0.3}) for i in range(1, 21)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    text = demo.summary(config, run / "report.html", demo.Timings(run / "timings.json"), 71.0)
    for words in (
        "visible      4 of 4 (100%)",
        "direction    1 of 4 (25%)",
        "20 steps",
        "31.0 dB",
        "1 min 11 s in all",
    ):
        assert words in text
    assert str((run / "report.html").absolute()) in text
