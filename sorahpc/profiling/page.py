"""The page of what `sorahpc profile` has found: kernels of every node, training and sampling of every device."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from sorahpc.page import esc, fact_table, line_chart, page, roofline
from sorahpc.profiling.record import Summary, read_summary
from sorahpc.profiling.results import OURS, Node, Row, read_node
from sorahpc.runs import atomic_write


def write_profile_page(folders: Sequence[Path], out: Path) -> Path:
    """Write one page of all that lies in the `profile` folders of some runs, and return its path.

    Raises:
        DataError: a file there is not one of a profile.
    """
    nodes = [read_node(path) for folder in folders for path in sorted(folder.glob("kernels/*.json"))]
    traces = {
        job: [(path, read_summary(path)) for folder in folders for path in sorted(folder.glob(f"{job}/*_rank*.json"))]
        for job in ("train", "sample")
    }
    body = ["<header><h1>Profile</h1><p>What ops, training and sampling take, and the device's limits.</p></header>"]
    if not nodes and not any(traces.values()):
        body.append('<p class="note">Nothing is measured yet: `sorahpc profile kernels`, `train` or `sample`.</p>')
    full = [node for node in nodes if not node.small]
    if len({node.device for node in full}) > 1:
        body.append(_section("Kernels of all devices", _devices(full)))
    devices = [node.device + ", small" * node.small for node in nodes]
    for device, node in zip(devices, nodes, strict=True):
        where = f" ({node.host}, {node.date})" if devices.count(device) > 1 else ""
        body.append(_section(f"Kernels on {device}{where}", _node(node)))
    for job, found in traces.items():
        body += [
            _section(f"{job} on {summary.device}, rank {summary.rank} of {summary.world_size}", _trace(path, summary))
            for path, summary in found
        ]
    atomic_write(out, page("SoraHPC profile", "\n".join(body)))
    return out


def _section(title: str, html: str) -> str:
    return f"<section><h2>{esc(title)}</h2>\n{html}\n</section>"


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f'<th scope="col">{esc(name)}</th>' for name in head)
    return f'<div class="scroll"><table class="rows"><thead><tr>{cells}</tr></thead>{"".join(rows)}</table></div>'


def _numbers(*values: str) -> str:
    return "".join(f'<td class="number">{esc(value)}</td>' for value in values)


def _bar(share: float) -> str:
    return f'<td><div class="bar"><span style="width:{min(max(share, 0.0), 1.0) * 100:.1f}%"></span></div></td>'


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


def _node(node: Node) -> str:
    dates, commits = sorted({row.date for row in node.rows}), sorted({row.commit or "unknown" for row in node.rows})
    facts = [("node", node.host), ("measured", " to ".join(dict.fromkeys((*dates[:1], *dates[-1:]))) or node.date)]
    facts += [("torch", node.torch), ("commit", ", ".join(commits) or node.commit or "unknown")]
    for ceiling in node.ceilings:
        unit = "GB/s read and written" if ceiling.name == "copy" else "GFLOP/s"
        what = f"{ceiling.name}, {_precision(ceiling.dtype, ceiling.threads)}"
        facts.append((what, f"{ceiling.value:,.1f} {unit} ({ceiling.how})"))
    over = any(row.of_limit > 1 for row in node.rows)
    out = [fact_table(facts)]
    if node.small:
        out.append('<p class="note">Its sizes are for trying the command out: no figure here means anything.</p>')
    out.append('<div class="charts wide-ones">')
    out += [_roofline(node, threads) for threads in sorted({c.threads for c in node.ceilings})]
    out.append("</div>")
    idle = dict.fromkeys(row.case for row in node.rows if row.gflop_s == 0)
    if idle:
        out.append(f"<p>Not on the roofline, as it moves bytes and computes nothing: {esc(', '.join(idle))}.</p>")
    out.append(
        "<p>A full bar is the speed of this device's copy, measured beside each case. Bytes are those that the case "
        "must move at the least; a candidate that moves more shows it as less bandwidth."
        + (" A share above 100 % is no error: the copy's own runs vary too." if over else "")
        + "</p>"
    )
    rows = []
    for key, group in groupby(node.rows, key=lambda r: r.key):
        rows += _case(list(group))
        for missing in (out for out in node.left_out if out.key == key):
            cells = f'<th scope="row">{esc(missing.candidate)}</th><td colspan="7">left out: {esc(missing.reason)}</td>'
            rows.append(f"<tr>{cells}</tr>")
    head = ("", "ms", "10 to 90 %", "GB/s", "of copy", "", "time / ours", "peak MB")
    return "\n".join([*out, _table(head, rows)])


def _precision(dtype: str, threads: int) -> str:
    return dtype + (f", {threads} thread{'s' if threads > 1 else ''}" if threads else "")


def _case(rows: list[Row]) -> list[str]:
    first = rows[0]
    title = f"{first.case}, {_precision(first.dtype, first.threads)}: {first.shape}; copy {first.limit_gb_s:,.1f} GB/s"
    out = [f'<tr><th scope="colgroup" colspan="8">{esc(title)}</th></tr>']
    for row in rows:
        beaten = row.candidate != OURS and row.ours_is_faster_by < 1
        ratio = "" if row.candidate == OURS else f"{row.ours_is_faster_by:.2f}" + (" (faster)" if beaten else "")
        out.append(
            f'<tr{" class=ours" if row.candidate == OURS else ""}><th scope="row">{esc(row.candidate)}</th>'
            + _numbers(f"{row.median_ms:,.2f}", f"{row.p10_ms:,.2f} to {row.p90_ms:,.2f}", f"{row.gb_s:,.1f}")
            + _numbers(f"{row.of_limit:.0%}")
            + _bar(row.of_limit)
            + f'<td class="number{" warn" if beaten else ""}">{esc(ratio)}</td>'
            + _numbers(f"{row.peak_mb:,.0f}")
            + "</tr>"
        )
    return out


def _roofline(node: Node, threads: int) -> str:
    ceilings = [c for c in node.ceilings if c.threads == threads]
    # The fastest copy seen: the one at the start may have met a slow moment, and points would lie above the roof.
    bandwidth = max(c.value for c in ceilings if c.name == "copy")
    bandwidth = max([bandwidth, *(row.limit_gb_s for row in node.rows if row.threads == threads)])
    peaks = [(f"matmul {c.dtype}", c.value) for c in ceilings if c.name == "matmul"]
    points = []
    counted = [row for row in node.rows if row.threads == threads and row.gflop_s > 0 and row.gb_s > 0]
    for _, group in groupby(counted, key=lambda r: r.key):
        ours, *peers = sorted(group, key=lambda r: (r.candidate != OURS, r.median_ms))
        name = f"{' '.join(ours.case.split()[:2])} {ours.dtype}"
        points.append((name, ours.gflop_s / ours.gb_s, ours.gflop_s, "solid"))
        points += [(f"{name}, {p.candidate}", p.gflop_s / p.gb_s, p.gflop_s, "hollow") for p in peers[:1]]
    title = "Roofline" + (f", {threads} thread{'s' if threads > 1 else ''}" if threads else "")
    return roofline(f"{title}: ours solid, the best peer hollow", bandwidth, peaks, points)


def _devices(nodes: Sequence[Node]) -> str:
    """Ours on each device, a row a case."""
    found: dict[tuple[str, str, str], dict[int, Row]] = {}
    for i, node in enumerate(nodes):
        for row in node.rows:
            if row.candidate == OURS:
                cell = found.setdefault((row.case, row.dtype, row.shape), {})
                if i not in cell or row.median_ms < cell[i].median_ms:  # of several thread counts the fastest
                    cell[i] = row
    rows = []
    for (case, dtype, shape), cells in found.items():
        values = []
        for i in range(len(nodes)):
            row_ = cells.get(i)
            values.append("not measured" if row_ is None else f"{row_.gb_s:,.1f} GB/s, {row_.of_limit:.0%} of copy")
        rows.append(f'<tr><th scope="row">{esc(case)}, {esc(dtype)}: {esc(shape)}</th>{_numbers(*values)}</tr>')
    return _table(["", *(f"{node.device} ({node.host})" for node in nodes)], rows)


# ---------------------------------------------------------------------------------------------------------------------
# Traces


def _trace(path: Path, summary: Summary) -> str:
    steps, tokens = summary.step_ms, sum(summary.step_tokens)
    unit, a_unit = ("pack", "a pack (text, Euler steps, VAE)") if summary.job == "sample" else ("step", "a step")
    facts = [
        ("node", summary.host),
        ("recorded", summary.date),
        ("torch", summary.torch),
        ("commit", summary.commit or "unknown"),
        (a_unit, f"{statistics.median(steps):,.1f} ms, {min(steps):,.1f} to {max(steps):,.1f} (of {len(steps)})"),
        (f"a recorded {unit}", f"{statistics.median(summary.recorded_step_ms):,.1f} ms; what follows is of these"),
    ]
    if unit == "step":  # a pack's time is not that of its tokens alone
        facts.append(("tokens a second", f"{tokens / sum(steps) * 1e3:,.0f}"))
    found = summary.found
    if found is None:
        report = path.parent / f"{summary.tool}_{summary.host}_rank{summary.rank}.{summary.tool}-rep"
        none = f"no report in {path.parent} yet; it comes when the job has ended, and only from a GPU"
        facts.append(("recorded by", f"{summary.tool}: {report if report.is_file() else none}"))
        return fact_table(facts)
    talk = found.communication
    hidden = f"{talk.overlapped_ms / talk.ms:.0%} of it while something computed" if talk.ms else "none"
    stem = path.name.removesuffix(".json")
    snapshot = path.with_name(f"{stem}.memory.pickle")
    above = "" if snapshot.is_file() else ", on a CPU above what was allocated when the recording began"
    facts += [
        ("busy", f"{found.busy_ms:,.1f} of {found.wall_ms:,.1f} ms a {unit} ({found.busy_ms / found.wall_ms:.0%})"),
        ("communication", f"{talk.ms:,.2f} ms a {unit}, {hidden}"),
        ("memory at the peak", f"{found.peak_bytes / 1e6:,.1f} MB{above}"),
        ("trace", f"{path.with_name(stem + '.trace.json.gz')} (chrome://tracing or Perfetto)"),
    ]
    if snapshot.is_file():
        facts.append(("memory snapshot", f"{snapshot} (docs.pytorch.org/memory_viz)"))
    whole = sum(part.ms for part in found.parts) or 1.0
    parts = [
        f'<tr><th scope="row">{esc(part.name)}</th>'
        + _numbers(*(f"{ms:,.2f}" if ms else "" for ms in (part.forward_ms, part.backward_ms, part.other_ms)))
        + _numbers(f"{part.ms:,.2f}", f"{part.ms / whole:.0%}")
        + _bar(part.ms / whole)
        + "</tr>"
        for part in found.parts
    ]
    ops = [
        f'<tr><th scope="row" class="long">{esc(op.name)}</th>{_numbers(f"{op.calls:,.1f}", f"{op.ms:,.2f}")}</tr>'
        for op in found.ops
    ]
    out = [fact_table(facts), f"<h3>Time by part, ms a {unit}</h3>"]
    out.append(_table(("", "forward", "backward", "other", "all", "share", ""), parts))
    if found.memory:
        times, sizes = [at for at, _ in found.memory], [size / 1e6 for _, size in found.memory]
        out.append(line_chart("Memory allocated", times, [("allocated", sizes, "bold")], "ms", "MB"))
    out += [f"<h3>What took longest, a {unit}</h3>", _table(("", "calls", "ms"), ops)]
    return "\n".join(out)
