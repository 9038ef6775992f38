"""One self-contained HTML page, for reports and profiles: its frame, its tables and its charts (inline SVG).

A page opens from disk and asks the network for nothing; its content policy forbids scripts. Every text that is put into
it goes through `esc`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from html import escape


def esc(value: object) -> str:
    """Any value as HTML text, safe inside an element and inside a quoted attribute."""
    return escape(str(value), quote=True)


def page(title: str, body: str) -> str:
    """The whole page. `title` is text, `body` HTML."""
    return _PAGE.format(title=esc(title), style=_STYLE, body=body)


def fact_table(facts: Sequence[tuple[str, str]]) -> str:
    """A table of (name, value)."""
    rows = "".join(f'<tr><th scope="row">{esc(name)}</th><td>{esc(value)}</td></tr>' for name, value in facts)
    return f'<table class="facts">{rows}</table>'


def bar_table(bars: Sequence[tuple[str, int]]) -> str:
    """A table of (label, count), each with a bar as long as its share of the largest."""
    most = max((count for _, count in bars), default=0) or 1
    rows = "".join(
        f'<tr><th scope="row">{esc(label)}</th><td>{count:,}</td><td class="wide"><div class="bar">'
        f'<span style="width:{count / most * 100:.1f}%"></span></div></td></tr>'
        for label, count in bars
    )
    return f'<table class="time">{rows}</table>'


# ---------------------------------------------------------------------------------------------------------------------
# Charts


def smooth(values: Sequence[float], window: int | None = None) -> list[float]:
    """Centred moving mean; the window, a twentieth of the series by default, shrinks at both ends."""
    half = (window or max(3, len(values) // 20)) // 2
    out = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        out.append(statistics.fmean(values[i - reach : i + reach + 1]))
    return out


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `count` of them."""
    if not high > low:
        low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999) * power
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [round(i * size, 12) for i in range(first, last + 1)]


def line_chart(
    title: str, x: Sequence[float], series: Sequence[tuple[str, Sequence[float], str]], x_label: str, y_label: str,
    *, robust: bool = False,
) -> str:  # fmt: skip
    """An inline SVG line chart from y = 0 (or below) up, with axes, grid, labels and a key.

    Args:
        x: increasing.
        series: (name, values as long as x, "thin" or "bold"); values that are not finite leave a gap.
        robust: the axis ends at three times the median where outliers go higher; they are cut at the edge.
    """
    width, height, left, right, top, bottom = 720, 300, 64, 16, 16, 48
    finite = [v for _, values, _ in series for v in values if math.isfinite(v)]
    if not finite:
        return f'<p class="note">{esc(title)}: no finite value.</p>'
    high = max(finite)
    if robust:
        high = min(high, 3 * statistics.median(finite))
    y_ticks, x_ticks = ticks(min(0.0, *finite), high), ticks(x[0], x[-1], 6)
    x_ticks = [t for t in x_ticks if x[0] <= t <= x[-1]] or [x[0]]
    y0, y1, x0, x1 = y_ticks[0], y_ticks[-1], x[0], x[-1] if x[-1] > x[0] else x[0] + 1

    def px(value: float) -> float:
        return left + (value - x0) / (x1 - x0) * (width - left - right)

    def py(value: float) -> float:
        return height - bottom - (min(value, y1) - y0) / (y1 - y0) * (height - top - bottom)

    parts = []
    for t in y_ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py(t):.1f}" y2="{py(t):.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{py(t) + 4:.1f}" text-anchor="end">{t:g}</text>')
    for t in x_ticks:
        parts.append(f'<text x="{px(t):.1f}" y="{height - bottom + 18}" text-anchor="middle">{t:,g}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{py(y0):.1f}" y2="{py(y0):.1f}"/>')
    centre, middle = (left + width - right) / 2, (top + height - bottom) / 2
    parts.append(f'<text x="{centre}" y="{height - 8}" text-anchor="middle">{esc(x_label)}</text>')
    parts.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{esc(y_label)}</text>')
    for _, values, kind in series:
        points = _thin_out(list(zip(x, values, strict=True)), 600)
        if len(points) == 1:
            parts.append(f'<circle class="{kind}" cx="{px(points[0][0]):.1f}" cy="{py(points[0][1]):.1f}" r="3"/>')
            continue
        path, pen_down = [], False
        for px_value, value in points:
            if math.isfinite(value):
                path.append(f"{'L' if pen_down else 'M'}{px(px_value):.1f} {py(value):.1f}")
            pen_down = math.isfinite(value)
        parts.append(f'<path class="{kind}" d="{" ".join(path)}"/>')
    if len(series) > 1:
        for i, (name, _, kind) in enumerate(series):
            at = width - right - 250 + 130 * i
            parts.append(f'<path class="{kind}" d="M{at} {top + 8}h22"/>')
            parts.append(f'<text x="{at + 28}" y="{top + 12}">{esc(name)}</text>')
    last = next((v for v in reversed(series[-1][1]) if math.isfinite(v)), math.nan)
    label = f"{title}: {y_label} over {x_label}, {x[0]:g} to {x[-1]:g}; last {last:.4g}"
    return _figure(title, label, width, height, parts)


def roofline(
    title: str,
    bandwidth_gb_s: float,
    peaks: Sequence[tuple[str, float]],
    points: Sequence[tuple[str, float, float, str]],
) -> str:
    """An inline SVG roofline (Williams et al. 2009), both axes logarithmic.

    Args:
        bandwidth_gb_s: of the fastest copy, the slope.
        peaks: (name, GFLOP/s), the flat roofs.
        points: (name, FLOP a byte, GFLOP/s, "solid" or "hollow"), all above 0; only solid ones carry their name.
    """
    width, height, left, right, top, bottom = 1080, 440, 72, 24, 20, 48
    if not points or not peaks:
        return f'<p class="note">{esc(title)}: nothing to show.</p>'
    best = max(value for _, value in peaks)
    x_low, x_high = math.log10(min(x for _, x, _, _ in points) / 2), math.log10(best / bandwidth_gb_s * 4)
    y_low, y_high = math.log10(min(y for _, _, y, _ in points) / 3), math.log10(best * 2)

    def px(x: float) -> float:
        return left + (math.log10(x) - x_low) / (x_high - x_low) * (width - left - right)

    def py(y: float) -> float:
        return height - bottom - (math.log10(y) - y_low) / (y_high - y_low) * (height - top - bottom)

    parts = []
    for power in range(math.ceil(x_low), math.floor(x_high) + 1):
        x = px(10.0**power)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{10.0**power:g}</text>')
    for power in range(math.ceil(y_low), math.floor(y_high) + 1):
        y = py(10.0**power)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    x0 = max(10.0**x_low, 10.0**y_low / bandwidth_gb_s)
    ridge = best / bandwidth_gb_s
    slope = f"M{px(x0):.1f} {py(x0 * bandwidth_gb_s):.1f}L{px(ridge):.1f} {py(best):.1f}"
    parts.append(f'<path class="bold" d="{slope}"/>')
    roofs: list[Box] = [
        _around(px(x0 * (ridge / x0) ** (i / 200)), py(x0 * (ridge / x0) ** (i / 200) * bandwidth_gb_s), 4)
        for i in range(201)
    ]
    # Half way up, on the left of the slope, where no point is.
    half = math.sqrt(x0 * ridge)
    parts.append(
        f'<text x="{px(half) - 10:.1f}" y="{py(half * bandwidth_gb_s) - 6:.1f}" text-anchor="end">'
        f"copy: {bandwidth_gb_s:,.1f} GB/s</text>"
    )
    copy_y = py(half * bandwidth_gb_s)
    taken: list[Box] = [(px(half) - 10 - TEXT_PX * 20, copy_y - 20, px(half) - 10, copy_y)]
    for name, value in peaks:
        start = px(max(value / bandwidth_gb_s, 10.0**x_low))
        parts.append(f'<path class="bold" d="M{start:.1f} {py(value):.1f}H{width - right}"/>')
        label = f"{name}: {value:,.0f} GFLOP/s"
        roofs.append((start, py(value) - 4, width - right, py(value) + 4))
        roofs.append((width - right - TEXT_PX * len(label), py(value) - 18, width - right, py(value)))
        parts.append(f'<text x="{width - right}" y="{py(value) - 6:.1f}" text-anchor="end">{esc(label)}</text>')
    lines: list[Box] = []
    inside = (left, top, width - right, height - bottom)
    for name, x, y, kind in points:
        taken.append(_around(px(x), py(y), 7))
        shown = f"{name}: {x:.2g} FLOP a byte, {y:,.1f} GFLOP/s"
        parts.append(
            f'<circle class="{kind}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="4"><title>{esc(shown)}</title></circle>'
        )
    for name, x, y, kind in sorted(points, key=lambda point: (point[1], -point[2])):
        if kind == "solid":
            at, over = px(x), py(y)
            label_x, label_y, path = _free_place(name, at, over, roofs, taken, lines, inside)
            anchor = ' text-anchor="end"' if label_x < at else ""
            parts.append(f'<path class="thin" d="{path}"/>')
            parts.append(f'<text x="{label_x:.1f}" y="{label_y + 4:.1f}"{anchor}>{esc(name)}</text>')
    centre, middle = (left + width - right) / 2, (top + height - bottom) / 2
    parts.append(f'<text x="{centre}" y="{height - 8}" text-anchor="middle">floating-point operations a byte</text>')
    parts.append(f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">GFLOP/s</text>')
    label = f"{title}: slope {bandwidth_gb_s:g} GB/s, " + ", ".join(
        f"{name} {value:g} GFLOP/s" for name, value in peaks
    )
    return _figure(title, label, width, height, parts)


Box = tuple[float, float, float, float]  # left, top, right, bottom
TEXT_PX = 7.4  # a letter of a chart's texts is at most about this wide, on average


def _around(x: float, y: float, by: float) -> Box:
    return x - by, y - by, x + by, y + by


def _free_place(
    name: str, x: float, y: float, roofs: Sequence[Box], taken: list[Box], lines: list[Box], inside: Box
) -> tuple[float, float, str]:
    """Where the name of the dot at (x, y) covers nothing: the nearest place that a line leads to without crossing
    another; else past other lines; else over what there is; else beside the dot.

    Args:
        roofs: what no name may cover; a line may.
        taken, lines: dots and names, and the lines to these; this name and its line are added.

    Returns:
        (x of the end of the text that is nearer to the dot, y of its middle, path of the line to it).
    """
    width = TEXT_PX * len(name)

    def text(dx: float, dy: float) -> Box:
        ends = (x + dx, x + dx + math.copysign(width, dx))
        return min(ends), y + dy - 8, max(ends), y + dy + 8

    def line(dx: float, dy: float) -> list[Box]:
        """Small boxes, from the dot's edge on."""
        length = math.hypot(dx, dy)
        return [_around(x + dx * i / length, y + dy * i / length, 1) for i in range(11, int(length) - 2, 3)]

    def is_free(box: Box) -> bool:
        fits = inside[0] <= box[0] and box[2] <= inside[2] and inside[1] <= box[1] and box[3] <= inside[3]
        return fits and not _touch([box], [*roofs, *taken, *lines])

    # Rather right than left, and rather beside the dot than above or below it.
    tried = [(dx, dy) for dx in (12, 24, 48, 80, 120, 180, 260, -12, -24, -48, -80, -120) for dy in range(-210, 211, 7)]
    tried.sort(key=lambda at: math.hypot(at[0] + 8 * (at[0] < 0), 1.5 * at[1]))
    free = [at for at in tried if is_free(text(*at))] or tried[:1]
    for others in ([*taken, *lines], taken, []):
        place = next((at for at in free if not _touch(line(*at), others)), None)
        if place is not None:
            break
    dx, dy = place or free[0]
    taken.append(text(dx, dy))
    lines += line(dx, dy)
    return x + dx, y + dy, f"M{x:.1f} {y:.1f}L{x + dx - math.copysign(2, dx):.1f} {y + dy:.1f}"


def _touch(some: Sequence[Box], others: Sequence[Box]) -> bool:
    return any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a in some for b in others)


def _figure(title: str, label: str, width: int, height: int, parts: Sequence[str]) -> str:
    return (
        f'<figure class="chart"><figcaption>{esc(title)}</figcaption><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{esc(label)}">{"".join(parts)}</svg></figure>'
    )


def _thin_out(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points: the mean of each stretch. A stretch with a value that is not finite keeps that value."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / most)
    out = []
    for i in range(0, len(points), size):
        stretch = points[i : i + size]
        out.append((statistics.fmean(p[0] for p in stretch), statistics.fmean(p[1] for p in stretch)))
    return out


_STYLE = """
:root { color-scheme: light dark; --paper: #fbfbfa; --card: #ffffff; --ink: #1d1f23; --soft: #62666e; --line: #e3e3df;
  --accent: #2f6bd8; --yes: #1a7f4b; --no: #b3372c; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --card: #1f2227; --ink: #e8e9eb; --soft: #9aa0a9;
  --line: #33373e; --accent: #7ba8ff; --yes: #5cc98f; --no: #f08a7f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 32px 24px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { margin: 0; font-size: 28px; letter-spacing: -0.01em; } h2 { margin: 0 0 8px; font-size: 19px; }
header p { margin: 2px 0 0; color: var(--soft); } section { margin-top: 40px; } p { margin: 0 0 12px; max-width: 96ch; }
small, .note { color: var(--soft); } .note { font-style: italic; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(148px, 1fr)); gap: 12px; margin-top: 20px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; } .tile span { color: var(--soft); }
.bar { height: 6px; border-radius: 3px; background: var(--line); overflow: hidden; margin-top: 8px; }
.bar span { display: block; height: 100%; background: var(--accent); }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 16px; }
.clips.pairs { grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
.clips figcaption { padding: 10px 12px 12px; overflow-wrap: anywhere; }
.clips small { display: block; margin-top: 4px; }
video { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--line);
  image-rendering: pixelated; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; }
.pair small { text-align: center; padding-top: 4px; margin: 0; }
.chips { display: flex; flex-wrap: wrap; gap: 4px 10px; list-style: none; margin: 6px 0 0; padding: 0;
  font-size: 13px; }
.chips .yes { color: var(--yes); } .chips .no { color: var(--no); } .chips span { font-weight: 700; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 16px; margin: 16px 0; }
.charts.wide-ones { grid-template-columns: 1fr; }
@media (max-width: 560px) { .charts { grid-template-columns: 1fr; } }
.chart { padding: 12px; } .chart figcaption { font-weight: 600; } svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 13px; font-variant-numeric: tabular-nums; } svg .grid { stroke: var(--line); }
svg .axis { stroke: var(--soft); } svg path { fill: none; stroke: var(--accent); stroke-linejoin: round; }
svg .bold { stroke-width: 2.2; } svg .thin { stroke-width: 1; opacity: 0.4; } svg circle { fill: var(--accent); }
svg circle.hollow { fill: none; stroke: var(--soft); }
table { border-collapse: collapse; margin-top: 16px; } th { font-weight: 400; color: var(--soft); text-align: left; }
th, td { padding: 4px 16px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; } table.time { width: 100%; max-width: 760px; }
.time th { white-space: nowrap; color: var(--ink); } .time td:not(.wide) { white-space: nowrap; text-align: right; }
table.rows { width: 100%; } .rows td, .rows th { white-space: nowrap; }
.rows thead th, .rows .ours td, .rows .ours th { color: var(--ink); font-weight: 600; }
.rows thead th, .rows td.number { text-align: right; } .rows tr th:first-child { text-align: left; }
/* The table scrolls under the names of its rows; on a phone these break. */
.rows tr > th:first-child:not([colspan]) { position: sticky; left: 0; background: var(--paper); }
@media (max-width: 560px) { .rows tr > th:first-child { white-space: normal; min-width: 110px; } }
.rows th.long { white-space: normal; overflow-wrap: anywhere; }
.rows .bar { margin: 6px 0 0; min-width: 120px; } .scroll { overflow-x: auto; } .rows td.warn { color: var(--no); }
.wide { width: 60%; vertical-align: middle; } .wide .bar { margin: 0; height: 10px; border-radius: 5px; }
pre { overflow-x: auto; padding: 14px; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  font-size: 13px; } details { margin-top: 16px; } summary { cursor: pointer; }
"""

# The content policy is the second lock: even a text that slipped through unescaped could not run or fetch anything.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; media-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
