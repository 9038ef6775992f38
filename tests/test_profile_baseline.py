"""`profile kernels`: rows are compared with a baseline's, and a file that can't be one is one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kernel_rows import make_node, make_row

from sorahpc import cli
from sorahpc.cli.launching import launch_job
from sorahpc.errors import ConfigError, DataError
from sorahpc.profiling.page import write_profile_page
from sorahpc.profiling.results import compare, read_node, write_node


def test_our_rows_are_compared_with_the_same_rows_of_the_baseline() -> None:
    before = make_node(rows=(make_row(10.0), make_row(5.0, dtype="bfloat16"), make_row(1.0, candidate="eager")))
    now = make_node(
        rows=(make_row(11.5), make_row(4.0, dtype="bfloat16"), make_row(9.0, candidate="eager"), make_row(1, shape="x"))
    )
    changes = compare(now, before)
    assert [(c.row.dtype, pytest.approx(c.slower_by)) for c in changes] == [("float32", 0.15), ("bfloat16", -0.2)]
    with pytest.raises(DataError, match=r"kernels.baseline: that of 2026-01-01 00:00 has no row of the case"):
        compare(make_node(rows=(make_row(1.0, threads=2),)), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0, True, "1", 10**400, None])
def test_a_baseline_of_figures_that_nothing_can_take_is_one_line(tmp_path: Path, value: Any) -> None:
    write_node(make_node(rows=(make_row(1.0),)), tmp_path / "b.json")
    data = json.loads((tmp_path / "b.json").read_text())
    assert read_node(tmp_path / "b.json").rows[0].median_ms == 1.0
    for changed in (data["rows"][0] | {"median_ms": value}, data["rows"][0] | {"gb_s": value or -1}):
        (tmp_path / "b.json").write_text(json.dumps(data | {"rows": [changed]}))
        with pytest.raises(DataError, match=r"b\.json: not what .* writes \((median_ms|gb_s|int too large)"):
            read_node(tmp_path / "b.json")
    (tmp_path / "b.json").write_text(json.dumps(data | {"ceilings": [data["ceilings"][0] | {"value": value}]}))
    with pytest.raises(DataError, match=r"b\.json: not what .* writes \((value|int too large)"):
        read_node(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ceilings": []}, "one copy with 1 threads expected, found 0"),
        ({"ceilings": 2 * [{"name": "copy", "dtype": "a", "threads": 1, "value": 1, "how": ""}]}, "found 2"),
        ({"format": True}, "a JSON mapping of format 2 expected"),
        ({"device": " "}, "device: ' '"),
        ({"small": 1}, "small: '1'"),
        ({"rows": [{"date": ""}]}, "no 'device'"),
    ],
)
def test_a_file_that_no_page_can_show_is_one_line(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    write_node(make_node(rows=(make_row(1.0),)), tmp_path / "r/kernels/b.json")
    data = json.loads((tmp_path / "r/kernels/b.json").read_text())
    (tmp_path / "r/kernels/b.json").write_text(json.dumps(data | changes))
    with pytest.raises(DataError, match=rf"b\.json: not what .* writes \(.*{expected}"):
        write_profile_page([tmp_path / "r"], tmp_path / "page.html")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"format": "1"}', '{"format": 2, "rows": [{}], "ceilings": []}'])
def test_a_baseline_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(DataError, match=r"b\.json: not what `sorahpc profile kernels` writes") as caught:
        read_node(tmp_path / "b.json")
    assert "\n" not in str(caught.value)


def test_a_file_of_another_format_says_so_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text('{"format": 1, "copies": []}')
    expected = r"b\.json: format 2 expected, found 1, of another version of sorahpc; move it away, and measure again"
    with pytest.raises(DataError, match=expected):
        read_node(tmp_path / "b.json")


def write_baselines(folder: Path) -> None:
    write_node(make_node(rows=(make_row(1.0),)), folder / "b.json")
    (folder / "old.json").write_text('{"format": 1, "rows": []}')
    (folder / "text.json").write_text("hello")
    (folder / "empty").mkdir()
    write_node(make_node(rows=(make_row(1.0),)), folder / "runs/p/profile/kernels/a.json")
    (folder / "link").symlink_to("runs/p/profile/kernels/a.json")


@pytest.mark.parametrize(
    ("baseline", "changes", "expected"),
    [
        ("nowhere.json", {}, "nowhere.json: no such file; `sorahpc profile kernels` writes one into"),
        ("text.json", {}, "text.json: not what `sorahpc profile kernels` writes "),
        ("old.json", {}, "old.json: format 2 expected, found 1, of another version of sorahpc; move it away, and mea"),
        ("b.json", {"small": True}, "b.json has no row of the case, dtype, shape and threads of one measured now; mea"),
        ("b.json", {"only": "K5"}, "b.json has no row of the case"),
        ("empty", {}, "empty: no <device>.json in this folder; `sorahpc profile kernels` writes one into"),
        (".", {"small": True}, ".: no <device>.small.json in this folder"),
        (
            "runs/p/profile/kernels",
            {},
            "runs/p/profile/kernels is the folder that this run writes into; copy it elsewhere, or",
        ),
        ("link", {}, "link is the file that this run writes; copy it elsewhere, or measure under another run=NAME"),
    ],
)
def test_a_baseline_that_can_never_serve_is_refused_before_anything_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, baseline: str, changes: dict[str, Any], expected: str
) -> None:
    write_baselines(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sorahpc.cluster.launch.launch", lambda *_, **__: pytest.fail("submitted"))
    overrides = [f"kernels.{key}={value}" for key, value in changes.items()]
    with pytest.raises(ConfigError) as caught:
        launch_job("profile-kernels", "profile", ["run=p", f"kernels.baseline={baseline}", *overrides], "slurm",
                    dry_run=False, as_json=False, wait=False)  # fmt: skip
    assert str(caught.value).startswith(f"kernels.baseline: {expected}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("baseline", ["b.json", "."])
def test_a_baseline_that_may_serve_goes_with_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, baseline: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_baselines(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["profile", "kernels", "run=p", "--baseline", baseline, "--cluster", "slurm", "--dry-run"]) == 0
    assert "#SBATCH" in capsys.readouterr().out


def test_a_baseline_is_looked_at_without_torch(tmp_path: Path) -> None:
    write_baselines(tmp_path)
    code = "import sys; from sorahpc import cli; assert cli.main(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    command = ["profile", "kernels", "run=p", "--baseline", "b.json", "--cluster", "slurm", "--dry-run"]
    subprocess.run([sys.executable, "-c", code, *command], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
