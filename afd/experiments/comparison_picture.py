"""The picture of a comparison of methods: clean accuracy against accuracy under AutoAttack, a point an entry.

Where some entries lie far from the others (natural training, near 0), a second panel shows the others closer. Names
are put where they cover neither each other nor a point.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afd.experiments.comparison_rows import Content, Row, amount, duration, points_of
from afd.installation import needed_by, save_picture

with needed_by("the picture of a comparison"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
    from matplotlib.transforms import Bbox

FAMILIES = {  # what a point's colour says: of whose kind a method is
    "natural": ("#7a7f87", ("natural",)),
    "AFD": ("#0b62c4", ("afd",)),
    "adversarial training": ("#d9730d", ("at", "trades", "mart", "alp")),
    "one-step attacks": ("#2b8a3e", ("fgsm-rs", "free", "gat", "nuat")),
    "gradient penalties": ("#8e44ad", ("llr", "jarn", "norm-penalty")),
}
OTHERS = ("others", "#8c564b")
SMALLEST, LARGEST = 30.0, 260.0  # area of a point, in square points
FAR = 4.0  # usual distances from the middle, beyond which an entry lies apart from the others
LEAST_SPREAD = 0.02  # that such a distance is taken for, at least
BAR: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.4}
LEADER = 4.0  # points from a point's edge, beyond which a line leads to its name
AROUND = [(radius, angle) for radius in (0.9, 1.5, 2.3, 3.3, 4.5, 6.0, 8.0) for angle in range(0, 360, 20)]


def plot(path: Path, content: Content) -> None:
    """Writes a PNG of the entries that are done; without any, it says so.

    Args:
        path: file to write.
        content: of compare.json.

    Raises:
        FileError: it cannot be written.
    """
    save_picture(draw(content), path)


def draw(content: Content) -> Picture:
    """The picture; a point's `gid` is the name of its entry."""
    points = points_of(content)
    near = _together(points)
    zoomed = len(near) < len(points)
    picture = Picture(figsize=(12.5, 7.0) if zoomed else (9.0, 6.8), dpi=120, layout="constrained")
    panels = list(picture.subplots(1, 2, width_ratios=(1, 2.1)) if zoomed else [picture.subplots()])
    of_what, sizes = _sizes(points)
    for axes in panels:
        shown = near if axes is panels[-1] else points
        for row in sorted(shown, key=lambda row: -sizes[row.entry]):  # the small ones upon the large
            _point(axes, row, content, sizes[row.entry])
        axes.set(xlabel="clean accuracy (%)", ylabel="accuracy under AutoAttack (%)")
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    whole, close = panels[0], panels[-1]
    _limits(close, near, whole=False)
    if zoomed:
        _limits(whole, points, whole=True)
        whole.set_title("all entries", fontsize=10)
        close.set_title("the entries in the frame", fontsize=10)
        (left, right), (low, high) = close.get_xlim(), close.get_ylim()
        frame = Rectangle((left, low), right - left, high - low, fill=False, edgecolor="0.4", linestyle="--")
        whole.add_patch(frame)
    if not points:
        close.text(0.5, 0.5, "no entry is done yet", transform=close.transAxes, ha="center")
    _legend(picture, points, content, of_what, sizes)
    data, told = content["data"], "" if content["finished"] else " (not finished)"
    ball = content["ball"].get("text") or ", ".join(f"{a} {b}" for a, b in content["ball"].get("union", {}).items())
    bars = "bars: 95%" + (" (of several seeds: their range)" if any(row.seed is None for row in points) else "")
    bars += ", as far as there is room"
    picture.suptitle(f"{data['name']}, ε = {ball}, {data['images']:,} test images{told}; {bars}", fontsize=11)
    picture.draw_without_rendering()  # so that sizes of text and axes are known
    picture.set_layout_engine("none")
    if zoomed:
        _name(whole, [row for row in points if row not in near], points, sizes)
    _name(close, near, near, sizes)
    return picture


def family(method: str) -> tuple[str, str]:
    """(name, colour) of the family of a method, wrapped or not."""
    kind = method.partition("+")[0].lower()
    return next(((name, colour) for name, (colour, kinds) in FAMILIES.items() if kind in kinds), OTHERS)


# --- Points -----------------------------------------------------------------------------------------------------------


def _place(row: Row) -> tuple[float, float]:
    clean, attacked = row.figure("clean"), row.figure("autoattack")
    assert clean is not None
    assert attacked is not None
    return 100 * clean.value, 100 * attacked.value


def _ends(row: Row) -> list[tuple[float, float]]:
    """Of the bars of a point: across, and upwards."""
    found = [row.figure("clean"), row.figure("autoattack")]
    return [(100 * one.low, 100 * one.high) for one in found if one is not None]


def _together(points: Sequence[Row]) -> list[Row]:
    """The entries that do not lie far from most of the others; all of them where few are left out by that."""
    if len(points) < 3:
        return list(points)
    places = [_place(row) for row in points]
    near = [True] * len(points)
    for axis in range(2):
        values = [place[axis] for place in places]
        middle = statistics.median(values)
        usual = max(statistics.median(abs(value - middle) for value in values), 100 * LEAST_SPREAD)
        near = [one and abs(value - middle) <= FAR * usual for one, value in zip(near, values, strict=True)]
    return [row for row, one in zip(points, near, strict=True) if one]


def _sizes(points: Sequence[Row]) -> tuple[str, dict[str, float]]:
    """What cost is told by, "time" or, unless all have one, "passes", and the area of each entry's point."""
    timed = all(row.seconds is not None for row in points)
    costs = {row.entry: float((row.seconds if timed else row.passes) or 0.0) for row in points}
    most = max(costs.values(), default=0.0) or 1.0
    return "time" if timed else "passes", {name: area(cost, most) for name, cost in costs.items()}


def area(cost: float, most: float) -> float:
    """Of a point: grows with its cost, from the smallest that can be seen."""
    return SMALLEST + (LARGEST - SMALLEST) * cost / most


def _point(axes: Axes, row: Row, content: Content, size: float) -> None:
    colour = family(content["entries"][row.entry]["method"])[1]
    (x, y), (across, upwards) = _place(row), _ends(row)
    axes.plot(across, [y, y], color=colour, zorder=2, **BAR)
    axes.plot([x, x], upwards, color=colour, zorder=2, **BAR)
    inside = "none" if row.verdict == "fail" else (colour, 0.75)
    axes.scatter([x], [y], s=size, facecolors=inside, edgecolors=colour, linewidths=1.6, zorder=3, gid=row.entry)


def _limits(axes: Axes, rows: Sequence[Row], *, whole: bool) -> None:
    """All of these points and some room for names; `whole` bars, too, or what falls within."""
    limits: tuple[Callable[[float, float], Any], ...] = (axes.set_xlim, axes.set_ylim)
    for axis, limit in enumerate(limits):
        found = [(_place(row)[axis], *_ends(row)[axis]) for row in rows]
        if found:
            low, high = (min(map(min, found)), max(map(max, found))) if whole else _range(one[0] for one in found)
            room = (0.1 if whole else 0.2) * max(high - low, 1.0)
            limit(low - room, high + room)


def _range(values: Iterable[float]) -> tuple[float, float]:
    known = list(values)
    return min(known), max(known)


def _legend(picture: Picture, points: Sequence[Row], content: Content, of_what: str, sizes: dict[str, float]) -> None:
    """Families by colour, hollow points, and what sizes mean: the least, the middle and the largest cost."""
    families = dict.fromkeys(family(content["entries"][row.entry]["method"]) for row in points)
    marks = [_mark(name, colour, colour, 8) for name, colour in families]
    if any(row.verdict == "fail" for row in points):
        marks.append(_mark("checks failed", "0.3", "white", 8))
    costs = sorted(
        {(row.seconds if of_what == "time" else row.passes) or 0.0: sizes[row.entry] for row in points}.items()
    )
    told = {}
    for cost, size in (costs[0], costs[len(costs) // 2], costs[-1]) if costs else ():
        told[duration(cost) if of_what == "time" else f"{amount(cost)} passes"] = size
    marks += [_mark(text, "0.55", "0.85", math.sqrt(size)) for text, size in told.items()]
    if marks:
        picture.legend(
            handles=marks, loc="outside lower center", ncols=len(marks), fontsize=8.5, frameon=False, handletextpad=0.6
        )


def _mark(text: str, edge: str, inside: str, size: float) -> Line2D:
    return Line2D(
        [], [], linestyle="", marker="o", markersize=size, markeredgecolor=edge, markerfacecolor=inside, label=text
    )


# --- Names ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """A rectangle on the page, in pixels."""

    left: float
    low: float
    right: float
    high: float

    def shared(self, other: Box) -> float:
        """The area of what both cover."""
        across = min(self.right, other.right) - max(self.left, other.left)
        upwards = min(self.high, other.high) - max(self.low, other.low)
        return across * upwards if across > 0 and upwards > 0 else 0.0

    def outside(self, frame: Bbox) -> float:
        """By how many pixels it leaves a frame."""
        over = (frame.x0 - self.left, self.right - frame.x1, frame.y0 - self.low, self.high - frame.y1)
        return sum(max(0.0, float(one)) for one in over)


def _name(axes: Axes, named: Sequence[Row], drawn: Sequence[Row], sizes: dict[str, float]) -> None:
    """Writes names beside points: the most crowded first, each at the place near by that covers least."""
    scale = axes.figure.dpi / 72
    centres = {row.entry: tuple(axes.transData.transform(_place(row))) for row in drawn}
    radii = {row.entry: math.sqrt(sizes[row.entry] / math.pi) * scale for row in drawn}
    taken = [
        Box(x - radii[entry], y - radii[entry], x + radii[entry], y + radii[entry]) for entry, (x, y) in centres.items()
    ]
    bars = [bar for row in drawn for bar in _bars(axes, row)]
    lines: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for row in sorted(named, key=lambda row: sum(math.dist(centres[row.entry], one) for one in _nearest(row, centres))):
        text = axes.text(0, 0, row.entry, fontsize=9, zorder=5)
        extent = text.get_window_extent()
        width, height = extent.width, extent.height
        x, y = centres[row.entry]
        best = min(
            _places(x, y, radii[row.entry], width, height),
            key=lambda found: _cost(found, (x, y), taken, bars, lines, axes.bbox) + _astray(found, row.entry, centres),
        )
        end = _nearest_in(best, x, y)
        if math.dist(end, (x, y)) > radii[row.entry] + LEADER * scale:
            lines.append(((x, y), end))
            along = radii[row.entry] / math.dist(end, (x, y))
            edge = (x + along * (end[0] - x), y + along * (end[1] - y))
            ends = [axes.transData.inverted().transform(one) for one in (edge, end)]
            axes.plot(*zip(*ends, strict=True), color="0.35", linewidth=0.7, zorder=2.5, scalex=False, scaley=False)
        text.set_position(tuple(axes.transData.inverted().transform((best.left, best.low))))
        text.set_verticalalignment("bottom")
        taken.append(best)


def _nearest(row: Row, centres: dict[str, Any]) -> Iterable[tuple[float, float]]:
    others = (place for name, place in centres.items() if name != row.entry)
    return sorted(others, key=lambda place: math.dist(place, centres[row.entry]))[:3]


def _astray(box: Box, entry: str, centres: dict[str, Any]) -> float:
    """What speaks against a place that is nearer to the points of others than to its own."""
    away = {name: math.dist(_nearest_in(box, *one), one) for name, one in centres.items()}
    return 20.0 * sum(one < away[entry] for one in away.values())


def _places(x: float, y: float, radius: float, width: float, height: float) -> Iterable[Box]:
    """Where a name may stand: around its point, nearest first."""
    for distance, angle in AROUND:
        gap = radius + distance * height * 0.55
        cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        left = x + gap * cosine + (0.5 * cosine - 0.5) * width
        low = y + gap * sine + (0.5 * sine - 0.5) * height
        yield Box(left, low, left + width, low + height)


def _cost(
    box: Box,
    point: tuple[float, float],
    taken: Sequence[Box],
    bars: Sequence[Box],
    lines: Sequence[tuple[tuple[float, float], tuple[float, float]]],
    frame: Bbox,
) -> float:
    """What speaks against a place: names and points covered, bars crossed, its leader crossing things, distance."""
    end = _nearest_in(box, *point)
    wide = Box(box.left - 2, box.low - 1, box.right + 2, box.high + 1)
    covered = sum(wide.shared(one) for one in taken)
    crossed = sum(wide.shared(one) > 0 for one in bars)
    over = sum(_between(point, end, one) for one in taken if not _holds(one, point))
    leaders = sum(_cross(point, end, *line) for line in lines)
    through = sum(_between(*line, wide) for line in lines)
    far = math.dist(end, point)
    return 50 * covered + 1e4 * box.outside(frame) + 12 * crossed + 400 * over + 300 * leaders + 400 * through + far


def _bars(axes: Axes, row: Row) -> list[Box]:
    (x, y), (across, upwards) = _place(row), _ends(row)
    (left, low), (right, high) = axes.transData.transform([(across[0], upwards[0]), (across[1], upwards[1])])
    x, y = axes.transData.transform((x, y))
    return [Box(left, y - 1, right, y + 1), Box(x - 1, low, x + 1, high)]


def _nearest_in(box: Box, x: float, y: float) -> tuple[float, float]:
    return min(max(x, box.left), box.right), min(max(y, box.low), box.high)


def _holds(box: Box, point: tuple[float, float]) -> bool:
    return box.left <= point[0] <= box.right and box.low <= point[1] <= box.high


def _between(start: tuple[float, float], end: tuple[float, float], box: Box) -> bool:
    """Whether a line touches a box, as far as 16 of its points tell."""
    steps = [(start[0] + (end[0] - start[0]) * i / 16, start[1] + (end[1] - start[1]) * i / 16) for i in range(16)]
    return any(_holds(box, one) for one in steps)


def _cross(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float], d: tuple[float, float]) -> bool:
    """Whether the lines from a to b and from c to d cross."""

    def side(p: tuple[float, float], q: tuple[float, float], r: tuple[float, float]) -> float:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0
