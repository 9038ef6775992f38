"""What is in a manifest: counts, hours, distributions, and reasons for rejection, as numbers, as text and as a page."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from sorahpc.data.manifest import Video, shown
from sorahpc.page import bar_table, esc, fact_table, page, ticks

MAX_KINDS = 12  # of sizes, rates, reasons; what is left is one line
BAR_CHARS = 40
_ASPECTS = {
    "1:2 or narrower": 1 / 2, "9:16": 9 / 16, "2:3": 2 / 3, "3:4": 3 / 4, "1:1": 1, "4:3": 4 / 3, "3:2": 3 / 2,
    "16:9": 16 / 9, "2:1": 2, "21:9 or wider": 21 / 9,
}  # fmt: skip
_UNITS = {
    "duration": "s", "luma": "mean, of 255", "black": "share of black pixels",
    "motion": "change of luma in 1/4 s, of 255", "static": "share of 1/4 s without motion", "tokens": "a clip",
}  # fmt: skip


def overview(
    videos: Sequence[Video], plan: Callable[[Video], tuple[int, int, int] | str] | None = None
) -> dict[str, Any]:
    """Count a manifest.

    Args:
        plan: what encode makes of a clip: its tokens and its height and width, or why it is rejected there.

    Returns:
        videos (files), clips, ok, rejected; hours, of usable clips; measured: how many of these; distributions: by name
        min, p10, median, mean, p90 and max, and bins (from, to, count; the last one takes all above); kinds: by name
        (resolution, aspect, fps, codec, encoded size) numbers by label, the most frequent first; reasons: kind, count,
        and one in full with its path. All but the reasons are of usable clips.
    """
    usable = [v for v in videos if v.ok]
    measured = [v for v in usable if v.measured]
    distributions = {"duration": _distribution([v.duration_s for v in usable])}
    for name in ("luma", "black", "motion", "static"):
        distributions[name] = _distribution([getattr(v, name) for v in measured])
    kinds = {
        "resolution": _kinds(f"{v.width}x{v.height}" for v in usable),
        "aspect": {name: count for name in _ASPECTS if (count := _aspects(usable)[name])},
        "fps": _kinds(f"{v.fps:.3f}".rstrip("0").rstrip(".") for v in usable),
        "codec": _kinds(v.codec for v in usable),
    }
    refused: list[tuple[Video, str]] = [(v, v.reason) for v in videos if not v.ok]
    if plan is not None:
        plans = [(v, plan(v)) for v in usable]
        found = [p for _, p in plans if not isinstance(p, str)]
        distributions["tokens"] = _distribution([tokens for tokens, _, _ in found])
        kinds["encoded size"] = _kinds(f"{width}x{height}" for _, height, width in found)
        refused += [(v, f"encode: {p}") for v, p in plans if isinstance(p, str)]
    return {
        "videos": len({v.path for v in videos}),
        "clips": len(videos),
        "ok": len(usable),
        "rejected": len(videos) - len(usable),
        "hours": sum(v.duration_s for v in usable) / 3600,
        "measured": len(measured),
        "distributions": {name: found for name, found in distributions.items() if found},
        "kinds": {name: found for name, found in kinds.items() if found},
        "reasons": _reasons(refused),
    }


def _distribution(values: Sequence[float]) -> dict[str, Any]:
    """Empty without values. Bins are of a round width, and end near the 99th percentile."""
    if not values:
        return {}
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    edges = ticks(ordered[0], at(0.99), 10)
    counts = [0] * (len(edges) - 1)
    for value in ordered:
        width = edges[1] - edges[0]
        counts[min(len(counts) - 1, max(0, math.floor((value - edges[0]) / width + 1e-9)))] += 1
    there = [i for i, count in enumerate(counts) if count]  # none below the least: no share is negative
    every = list(zip(edges, edges[1:], counts, strict=False))[there[0] : there[-1] + 1]
    bins = [{"from": a, "to": b, "count": n} for a, b, n in every]
    return {
        "min": ordered[0], "p10": at(0.1), "median": at(0.5), "mean": statistics.fmean(ordered), "p90": at(0.9),
        "max": ordered[-1], "bins": bins,
    }  # fmt: skip


def _kinds(labels: Any) -> dict[str, int]:
    counts = Counter(labels)
    most = dict(counts.most_common(MAX_KINDS))
    others = counts.total() - sum(most.values())
    return {**most, f"{len(counts) - MAX_KINDS} others": others} if others else most


def _aspects(videos: Sequence[Video]) -> Counter[str]:
    """By the nearest of the usual ones."""
    near = {
        ratio: min(_ASPECTS, key=lambda name: abs(math.log(_ASPECTS[name] / ratio)))
        for ratio in {v.width / v.height for v in videos if v.width and v.height}
    }
    return Counter(near[v.width / v.height] for v in videos if v.width and v.height)


def _reasons(refused: Sequence[tuple[Video, str]]) -> list[dict[str, Any]]:
    """By kind, the most frequent first."""
    kinds: dict[str, list[tuple[Video, str]]] = {}
    for video, reason in refused:
        kind = ":".join(reason.split(":")[: 2 if reason.startswith("encode: ") else 1])
        kinds.setdefault(kind, []).append((video, reason))
    return [
        {"kind": kind, "count": len(them), "such_as": them[0][1], "path": them[0][0].path}
        for kind, them in sorted(kinds.items(), key=lambda item: -len(item[1]))
    ]


# ---------------------------------------------------------------------------------------------------------------------
# as text, and as a page


def _label(low: float, high: float, is_last: bool, most: float) -> str:
    return f"{low:g} to {most:.4g}" if is_last and most > high else f"{low:g} to {high:g}"


def _bars(found: dict[str, Any]) -> list[tuple[str, list[tuple[str, int]]]]:
    """(title, [(label, count)]) of each distribution and kind."""
    out = []
    for name, values in found["distributions"].items():
        told = ", ".join(f"{key} {values[key]:.4g}" for key in ("min", "p10", "median", "mean", "p90", "max"))
        last = len(values["bins"]) - 1
        bars = [
            (_label(b["from"], b["to"], i == last, values["max"]), b["count"]) for i, b in enumerate(values["bins"])
        ]
        out.append((f"{name} ({_UNITS[name]}): {told}", bars))
    out += [(name, [(shown(k), n) for k, n in counts.items()]) for name, counts in found["kinds"].items()]
    return out


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("videos", f"{found['videos']:,}"), ("clips", f"{found['clips']:,}"), ("usable", f"{found['ok']:,}"),
        ("rejected", f"{found['rejected']:,}"), ("hours, usable", f"{found['hours']:,.2f}"),
    ]  # fmt: skip
    if found["measured"] < found["ok"]:
        facts.append(("not measured", f"{found['ok'] - found['measured']:,}"))
    return facts


def as_text(found: dict[str, Any]) -> str:
    """For a terminal: bars of characters."""
    lines = [", ".join(f"{name} {value}" for name, value in _facts(found))]
    for title, bars in _bars(found):
        most, wide = max(n for _, n in bars), max(len(label) for label, _ in bars)
        lines += ["", title]
        for label, count in bars:
            lines.append(f"{label:>{wide}} {count:>9,} {'#' * math.ceil(count / most * BAR_CHARS)}".rstrip())
    if found["reasons"]:
        lines += ["", "rejected"]
        for row in found["reasons"]:
            lines.append(f"{row['count']:>9,} {shown(row['kind'])}; such as {shown(row['path'])}: {_told(row)}")
    return "\n".join(lines)


def _told(row: dict[str, Any]) -> str:
    return shown(row["such_as"])


def as_page(found: dict[str, Any], title: str) -> str:
    """A self-contained HTML page."""
    body = [f"<header><h1>{esc(title)}</h1><p>What is in a manifest</p>{fact_table(_facts(found))}</header>"]
    for name, bars in _bars(found):
        body.append(f"<section><h2>{esc(name)}</h2>{bar_table(bars)}</section>")
    if found["reasons"]:
        bars = [(shown(row["kind"]), row["count"]) for row in found["reasons"]]
        such = "".join(
            f"<tr><td>{esc(shown(row['kind']))}</td><td>{esc(shown(row['path']))}</td><td>{esc(_told(row))}</td></tr>"
            for row in found["reasons"]
        )
        body.append(f"<section><h2>rejected</h2>{bar_table(bars)}<table>{such}</table></section>")
    return page(title, "\n".join(body))
