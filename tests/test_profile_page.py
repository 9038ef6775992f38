"""`profile kernels`: the page compares devices, and its roofline hides nothing."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from kernel_rows import make_node, make_row

from sorahpc.page import roofline
from sorahpc.profiling.page import write_profile_page
from sorahpc.profiling.results import write_node


def test_several_devices_are_compared_on_one_page(tmp_path: Path) -> None:
    slow = make_node("A100 <b>", rows=(make_row(2.0, gb_s=1500.0), make_row(9.0, candidate="eager")))
    fast = make_node("H100", rows=(make_row(1.0, gb_s=3000.0), make_row(0.5, candidate="eager", ours_is_faster_by=0.5)))
    write_node(slow, tmp_path / "r1/kernels/a100.json")
    write_node(fast, tmp_path / "r2/kernels/h100.json")
    text = write_profile_page([tmp_path / "r1", tmp_path / "r2"], tmp_path / "page.html").read_text()
    assert "Kernels of all devices" in text and "1,500.0 GB/s, 90% of copy" in text and "3,000.0 GB/s" in text
    assert "A100 &lt;b&gt;" in text and "<b>" not in text
    assert "0.50 (faster)" in text, "a peer that wins is said to"


def test_the_roof_is_the_fastest_copy_of_its_threads(tmp_path: Path) -> None:
    rows = (
        make_row(1.0, limit_gb_s=35.0),
        make_row(1.0, case="K3 b", of_limit=1.2),
        make_row(1.0, threads=2, limit_gb_s=50.0),
    )
    two = tuple(dataclasses.replace(c, threads=2) for c in make_node().ceilings)
    write_node(make_node(rows=rows, ceilings=(*make_node().ceilings, *two)), tmp_path / "kernels/a.json")
    text = write_profile_page([tmp_path], tmp_path / "page.html").read_text()
    assert ">copy: 35.0 GB/s</text>" in text and ">copy: 50.0 GB/s</text>" in text
    assert "float32, 1 thread: L=1; copy 35.0 GB/s" in text, "what the shares of a case refer to"
    assert "A share above 100 % is no error" in text
    write_node(make_node(rows=rows[:1]), tmp_path / "kernels/a.json")
    text = write_profile_page([tmp_path], tmp_path / "page.html").read_text()
    assert "A share above 100 %" not in text


def test_devices_are_compared_at_the_same_shape_and_nodes_of_one_device_are_told_apart(tmp_path: Path) -> None:
    other = make_row(2.0, shape="L=2", gb_s=15.0)
    write_node(make_node(rows=(make_row(1.0), other)), tmp_path / "r1/kernels/a.json")
    write_node(make_node(rows=(make_row(1.0),), host="node2"), tmp_path / "r2/kernels/a.json")
    write_node(make_node("B", rows=(other,), host="node3"), tmp_path / "r3/kernels/b.json")
    folders = [tmp_path / name for name in ("r1", "r2", "r3")]
    text = write_profile_page(folders, tmp_path / "page.html").read_text()
    first, second = re.findall(r"K1 rope, float32: (L=\d)</th>(.*?)</tr>", text)
    assert [first[0], second[0]] == ["L=1", "L=2"]
    assert first[1].count("10.0 GB/s") == 2 and first[1].count("not measured") == 1
    assert second[1].count("15.0 GB/s") == 2 and second[1].count("not measured") == 1
    assert [title in text for title in ("on A (node1, ", "on A (node2, ", "Kernels on B</h2>")] == [True] * 3


def test_the_roofline_names_its_cases_and_says_which_compute_nothing(tmp_path: Path) -> None:
    rows = (make_row(1.0, case="K4 patchify", gflop_s=0.0), make_row(1.0, case="K4 flow_patchify of a clip"))
    write_node(make_node(rows=rows), tmp_path / "kernels/a.json")
    text = write_profile_page([tmp_path], tmp_path / "page.html").read_text()
    assert ">K4 flow_patchify float32</text>" in text
    assert "Not on the roofline, as it moves bytes and computes nothing: K4 patchify.</p>" in text


def test_an_empty_run_says_what_to_do(tmp_path: Path) -> None:
    text = write_profile_page([tmp_path], tmp_path / "page.html").read_text()
    assert "Nothing is measured yet" in text


def test_the_roofline_shows_every_point_below_or_above_its_roof() -> None:
    chart = roofline("R <1>", 20.0, [("float32", 100.0)], [("K1", 0.5, 9.0, "solid"), ("peer", 0.5, 3.0, "hollow")])
    assert chart.count("<circle") == 2 and 'class="hollow"' in chart and "R &lt;1&gt;" in chart
    assert "K1: 0.5 FLOP a byte, 9.0 GFLOP/s" in chart
    assert "nothing to show" in roofline("R", 20.0, [], [])


@pytest.mark.parametrize("roofs", [(37.0, 300.0), (2400.0, 700_000.0)])
def test_no_name_on_the_roofline_covers_a_dot_or_another_name(roofs: tuple[float, float]) -> None:
    """Points as measured: ours near the roof, peers below, pairs of dtypes at twice the operations a byte."""
    scale = roofs[0] / 37
    points = []
    for name, x, ours, peer in (
        ("K1 rope3d", 0.375, 12.0, 8.5), ("K2 qk-norm", 1.0, 15.0, 5.6), ("K3 gated", 0.6, 15.5, 11.0),
        ("K4 flow_patchify", 0.333, 1.75, 0.4), ("K5 add_sincos3d", 0.125, 3.8, 2.3),
        ("K6 of tomorrow", 0.13, 3.6, 2.2),
    ):  # fmt: skip
        for dtype, factor in (("float32", 1), ("bfloat16", 2)):
            points.append((f"{name} {dtype}", factor * x, factor * ours * scale, "solid"))
            points.append((f"{name} {dtype}, eager", factor * x, factor * peer * scale, "hollow"))
    chart = roofline("R", roofs[0], [("matmul bfloat16", roofs[1])], points)
    dots = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)]
    texts = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"( text-anchor="end")?>((?:K\d|copy|matmul)[^<]*)<', chart)
    assert len(dots) == 24 and len(texts) == 12 + 2
    boxes = []
    for x_text, y_text, end, text in texts:
        x, y, width = float(x_text), float(y_text), 6.8 * len(text)
        boxes.append((x - width if end else x, y - 10, x if end else x + width, y + 3))
        assert 0 < boxes[-1][0] and boxes[-1][2] < 1080, text
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert not [d for d in dots if left - 4 < d[0] < right + 4 and top - 4 < d[1] < bottom + 4], texts[i]
        others = [b for b in boxes[:i] if left < b[2] and b[0] < right and top < b[3] and b[1] < bottom]
        assert not others, texts[i]
