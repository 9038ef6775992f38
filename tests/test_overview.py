from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from sorahpc.cli import main
from sorahpc.data.manifest import Video, write_manifest
from sorahpc.data.overview import as_page, as_text, overview


def clip(i: int, **fields: object) -> Video:
    video = Video(
        f"{i:016x}", f"/v/{i}.mp4", "a clip", 100, 25.0, 1920, 1080, "h264", 4.0, 1, 1, "ok", "", 0.0, 100.0, 0.1, 5.0,
        0.0, "0" * 48,
    )  # fmt: skip
    return replace(video, **fields)  # type: ignore[arg-type]


def some() -> list[Video]:
    rows = [clip(i, duration_s=float(1 + i % 10), motion=i / 10) for i in range(100)]
    rows += [clip(100 + i, width=1080, height=1920, fps=30000 / 1001) for i in range(20)]
    rows += [clip(200 + i, path="/v/long.mp4", start_s=4.0 * i, width=640, height=480, hash=None) for i in range(5)]
    reasons = ["static: 0.9 of it, over prepare.filters.max_static=0.8"] * 3 + [
        "black: <b>all</b>\n of it",
        "no such file",
    ]
    return rows + [clip(300 + i, status="rejected", reason=reason) for i, reason in enumerate(reasons)]


def test_a_manifest_is_counted() -> None:
    found = overview(some())
    assert (found["videos"], found["clips"], found["ok"], found["rejected"]) == (126, 130, 125, 5)
    assert found["measured"] == 120 and found["hours"] == pytest.approx((550 + 25 * 4) / 3600)
    duration = found["distributions"]["duration"]
    assert (duration["min"], duration["max"], duration["median"]) == (1, 10, 4) and duration["mean"] == 5.2
    for values in found["distributions"].values():
        assert sum(b["count"] for b in values["bins"]) in (125, 120)
        assert all(a["to"] == b["from"] for a, b in zip(values["bins"], values["bins"][1:], strict=False))
    assert {b["from"]: b["count"] for b in duration["bins"]}[4] == 10 + 25
    assert found["kinds"]["aspect"] == {"9:16": 20, "4:3": 5, "16:9": 100}
    assert found["kinds"]["resolution"] == {"1920x1080": 100, "1080x1920": 20, "640x480": 5}
    assert found["kinds"]["fps"] == {"25": 105, "29.97": 20}
    assert [(r["kind"], r["count"]) for r in found["reasons"]] == [("static", 3), ("black", 1), ("no such file", 1)]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_an_outlier_does_not_flatten_a_distribution() -> None:
    found = overview([*(clip(i, duration_s=1 + i / 250) for i in range(999)), clip(999, duration_s=9000.0)])
    bins = found["distributions"]["duration"]["bins"]
    assert bins[-1]["to"] <= 6 and len(bins) >= 8 and sum(b["count"] for b in bins) == 1000
    assert " to 9000 " in as_text(found)


def test_many_sizes_are_a_few_and_the_rest() -> None:
    found = overview([clip(i, width=100 + i // 2) for i in range(60)])
    sizes = found["kinds"]["resolution"]
    assert len(sizes) == 13 and sizes["18 others"] == 36 and sum(sizes.values()) == 60


def test_what_is_empty_or_all_alike_is_shown_too() -> None:
    for videos in ([], [clip(0)], [clip(0, status="rejected", reason="empty file: 0 bytes")], [clip(0, width=0)]):
        found = overview(videos)
        assert f"clips {len(videos)}" in as_text(found) and "</html>" in as_page(found, "m")


def test_texts_of_others_are_only_texts() -> None:
    found = overview([*some(), clip(500, codec="<script>x\x1b[2J", path="/v/\n<img>.mp4", status="ok")])
    text, html = as_text(found), as_page(found, "<title>")
    assert "\x1b" not in text and all(line.isprintable() for line in text.splitlines())
    for tag in ("<script", "<b>all", "<img", "<title>&lt;title"):
        assert (tag in html) == (tag == "<title>&lt;title")
    assert "http" not in html.replace("http-equiv", "") and "static" in html and "width:100.0%" in html


def call(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    umask = os.umask(0o077)
    try:
        code = main(["data", "show", *map(str, args)])
    finally:
        os.umask(umask)
    return code, *capsys.readouterr()


def test_data_show_prints_text_json_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_manifest(tmp_path / "runs/mine/manifest.parquet", some())
    (tmp_path / "runs/mine/jobs").mkdir()
    code, text, _ = call(capsys, "mine", "--html", "page.html")
    assert code == 0 and text.startswith("videos 126, clips 130, usable 125, rejected 5, hours, usable 0.18")
    assert "not measured 5" in text and "\n        3 static; such as /v/300.mp4: static: 0.9 of it" in text
    assert "resolution" in (tmp_path / "page.html").read_text()
    for what in ("runs/mine", "runs/mine/manifest.parquet"):
        code, out, _ = call(capsys, what, "--json")
        assert code == 0 and json.loads(out)["ok"] == 125
    for what, message in [
        ("nowhere", "nowhere: expected a run folder, or the name of one under runs/; runs here: mine"),
        ("nowhere.parquet", "nowhere.parquet: no such manifest; run `sorahpc prepare` first"),
        ("page.html", "page.html: expected a run folder, or the name of one under runs/; runs here: mine"),
    ]:
        code, out, err = call(capsys, what)
        assert code in (2, 4) and out == "" and err == f"sorahpc: {message}\n"
    os.mkfifo("pipe")
    code, _, err = call(capsys, "mine", "--html", "pipe")
    assert code == 2 and err == "sorahpc: --html: pipe: a file expected, found a device, pipe or socket\n"
    assert (tmp_path / "pipe").is_fifo()
    code, _, err = call(capsys, "mine", "--html", "no/such\0name")
    assert code != 0 and err.count("\n") == 1


def test_data_show_counts_the_tokens_that_encode_would_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_manifest(tmp_path / "m.parquet", [*some(), clip(900, duration_s=0.3)])
    config = {
        "run": "r", "clip": {"fps": 8, "max_frames": 17, "min_frames": 5, "max_area_px": 64 * 64},
        "vae": {"path": "configs/vae/toy"}, "model": {"depth": 1, "dim": 12, "num_heads": 1, "patch": [1, 2, 2]},
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    code, out, err = call(capsys, "m.parquet", "--config", "c.yaml", "--json")
    assert code == 0, err
    found = json.loads(out)
    tokens, sizes = found["distributions"]["tokens"], found["kinds"]["encoded size"]
    # Patches of 16x16 px; under 64x64 px 16:9 keeps most as 80x48, 15 of them, and 4:3 as 64x48. 1 s gives 8 frames,
    # of which the VAE takes 5, hence 2 latent frames; from 2.2 s on there are 17, hence 5.
    assert sizes == {"80x48": 100, "48x80": 20, "64x48": 5}
    assert (tokens["min"], tokens["max"]) == (2 * 15, 5 * 15)
    assert sum(b["count"] for b in tokens["bins"]) == 125
    (reason,) = [r for r in found["reasons"] if r["kind"].startswith("encode: ")]
    assert (reason["kind"], reason["count"], reason["path"]) == ("encode: too short", 1, "/v/900.mp4")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**config, "vae": {"path": "nowhere"}}))
    code, _, err = call(capsys, "m.parquet", "--config", "c.yaml")
    assert code == 2 and err.startswith("sorahpc: vae.path: ") and err.count("\n") == 1
