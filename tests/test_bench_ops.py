"""benchmarks/bench_ops.py: a file of a day is continued, and never replaced by rows of something else."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from kernel_rows import CPU, make_case, make_row

from sorahpc.profiling.machine import slug
from sorahpc.profiling.results import Row, read_csv, write_csv


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Row]]:
    """Runs the script with some cases; the rows of its file of this day."""
    path = Path(__file__).resolve().parent.parent / "benchmarks/bench_ops.py"
    spec = importlib.util.spec_from_file_location("bench_ops", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "RESULTS", tmp_path)

    def run_script(*names: str, args: tuple[str, ...] = (), end: str = ".csv") -> list[Row]:
        monkeypatch.setattr(script, "kernel_cases", lambda *_: iter([make_case(name=name) for name in names]))
        monkeypatch.setattr(sys, "argv", ["bench_ops.py", "--threads", "1", "--repeats", "3", *args])
        script.main()
        (file,) = tmp_path.glob(f"ops_????-??-??_{slug(CPU)}{end}")
        return read_csv(file)

    return run_script


def test_a_benchmark_of_some_cases_leaves_the_others_of_the_day(
    tmp_path: Path, bench: Callable[..., list[Row]]
) -> None:
    first = bench("K1 a", "K2 b")
    again = bench("K2 b", args=("--only", "K2"))
    assert [row.case for row in again] == ["K1 a"] * 2 + ["K2 b"] * 2
    assert again[:2] == first[:2] and again[2:] != first[2:]
    assert [row.case for row in bench("K1 a", args=("--small",), end=".small.csv")] == ["K1 a"] * 2
    (file,) = (f for f in tmp_path.iterdir() if "small" not in f.name)
    assert read_csv(file) == again


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,b\n1,2\n", r"rows\.csv: not a table of rows as measured here \(no 'date'\); move it away"),
        (None, r"rows\.csv: expected rows of .*, found some of A; see --out"),
    ],
)
def test_a_benchmark_replaces_no_file_that_it_cannot_continue(
    tmp_path: Path,
    bench: Callable[..., list[Row]],
    capsys: pytest.CaptureFixture[str],
    text: str | None,
    expected: str,
) -> None:
    file = tmp_path / "rows.csv"
    if text is None:
        write_csv([make_row(1.0)], file)
    else:
        file.write_text(text)
    before = file.read_bytes()
    with pytest.raises(SystemExit):
        bench("K1 a", args=("--out", str(file)))
    assert re.search(expected, capsys.readouterr().err) and file.read_bytes() == before
