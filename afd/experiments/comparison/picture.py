"""The picture of a comparison of methods: clean accuracy against accuracy under AutoAttack, a point an entry.

Where some entries lie far from the others (natural training, near 0), a second panel shows the others closer. Names
are put where they cover neither each other nor a point.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afd.experiments.comparison.rows import Content, Row, amount, ball_of, ended, points_of
from afd.experiments.display import duration
from afd.installation import needed_by, save_picture

with needed_by("the picture of a comparison"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

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
GUESSING = "X"  # the mark of an entry whose clean accuracy is at chance
OUTERMOST = (-2.0, 102.0)  # percent that an axis shows
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
    data, told = content["data"], "" if ended(content) else " (not finished)"
    bars = "bars: 95% over images, as far as there is room"
    title = f"{data['name']}, {ball_of(content)}, {data['images']:,} test images{told}; {bars}"
    picture.suptitle(title, fontsize=11)
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
    axes.scatter(
        [x], [y], s=size, marker=GUESSING if row.at_chance else "o", facecolors=inside, edgecolors=colour,
        linewidths=1.6, zorder=3, gid=row.entry,
    )  # fmt: skip


def _limits(axes: Axes, rows: Sequence[Row], *, whole: bool) -> None:
    """All of these points, and room for names; `whole` bars, or what falls within, but no less than one of them."""
    limits: tuple[Callable[[float, float], Any], ...] = (axes.set_xlim, axes.set_ylim)
    for axis, limit in enumerate(limits):
        found = [(_place(row)[axis], *_ends(row)[axis]) for row in rows]
        if found:
            low, high = (min(map(min, found)), max(map(max, found))) if whole else _range(one[0] for one in found)
            usual = statistics.median(one[2] - one[1] for one in found)  # lest what is no difference look like one
            room = max((0.1 if whole else 0.2) * max(high - low, 1.0), (usual - (high - low)) / 2)
            limit(max(low - room, OUTERMOST[0]), min(high + room, OUTERMOST[1]))


def _range(values: Iterable[float]) -> tuple[float, float]:
    known = list(values)
    return min(known), max(known)


def _legend(picture: Picture, points: Sequence[Row], content: Content, of_what: str, sizes: dict[str, float]) -> None:
    """Families by colour, hollow points, and what sizes mean: the least, the middle and the largest cost."""
    families = dict.fromkeys(family(content["entries"][row.entry]["method"]) for row in points)
    marks = [_mark(name, colour, colour, 8) for name, colour in families]
    if any(row.verdict == "fail" for row in points):
        marks.append(_mark("checks failed", "0.3", "white", 8))
    if any(row.at_chance for row in points):
        marks.append(_mark("clean accuracy at chance", "0.3", "0.3", 8, GUESSING))
    costs = sorted(
        {(row.seconds if of_what == "time" else row.passes) or 0.0: sizes[row.entry] for row in points}.items()
    )
    told = {}
    for cost, size in (costs[0], costs[len(costs) // 2], costs[-1]) if costs else ():
        if cost >= 1:  # a second, or a pass
            told[f"{duration(cost)} of training" if of_what == "time" else f"{amount(cost)} passes"] = size
    marks += [_mark(text, "0.55", "0.85", math.sqrt(size)) for text, size in told.items()]
    if marks:
        picture.legend(
            handles=marks, loc="outside lower center", ncols=len(marks), fontsize=8.5, frameon=False, handletextpad=0.6
        )


def _mark(text: str, edge: str, inside: str, size: float, marker: str = "o") -> Line2D:
    return Line2D(
        [], [], linestyle="", marker=marker, markersize=size, markeredgecolor=edge, markerfacecolor=inside, label=text
    )


# --- Names ------------------------------------------------------------------------------------------------------------


Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A rectangle on the page, in pixels."""

    left: float
    low: float
    right: float
    high: float

    @classmethod
    def around(cls, point: Point, radius: float) -> Box:
        """The square about a circle."""
        x, y = point
        return cls(x - radius, y - radius, x + radius, y + radius)

    def shared(self, other: Box) -> float:
        """The area of what both cover."""
        across = min(self.right, other.right) - max(self.left, other.left)
        upwards = min(self.high, other.high) - max(self.low, other.low)
        return across * upwards if across > 0 and upwards > 0 else 0.0

    def beyond(self, frame: Box) -> float:
        """By how many pixels it leaves a frame."""
        over = (frame.left - self.left, self.right - frame.right, frame.low - self.low, self.high - frame.high)
        return sum(max(0.0, one) for one in over)

    def nearest(self, point: Point) -> Point:
        """Its place nearest to a point."""
        return min(max(point[0], self.left), self.right), min(max(point[1], self.low), self.high)

    def away(self, point: Point) -> float:
        """Its distance from a point, 0 within."""
        return math.dist(self.nearest(point), point)

    def crossed(self, line: tuple[Point, Point]) -> bool:
        """Whether a line goes through it, as far as 16 of its points tell."""
        (x, y), (to_x, to_y) = line
        if not (min(x, to_x) <= self.right and max(x, to_x) >= self.left):
            return False
        if not (min(y, to_y) <= self.high and max(y, to_y) >= self.low):
            return False
        return any(not self.away((x + (to_x - x) * part / 16, y + (to_y - y) * part / 16)) for part in range(16))


@dataclass
class Panel:
    """What a name in a panel must not cover, in pixels.

    Attributes:
        frame: of the panel.
        centres: of its points, by entry.
        radii: of these.
        bars: of all intervals.
        leader: distance from a point's edge, beyond which a line leads to its name.
        names: that stand already.
        lines: that lead to some of these.
    """

    frame: Box
    centres: dict[str, Point]
    radii: dict[str, float]
    bars: list[Box]
    leader: float
    names: list[Box] = field(default_factory=list)
    lines: list[tuple[Point, Point]] = field(default_factory=list)

    def room(self, entry: str) -> float:
        """How far the nearest points are."""
        return sum(sorted(math.dist(self.centres[entry], one) for one in self.centres.values())[:4])

    def line(self, entry: str, box: Box) -> tuple[Point, Point] | None:
        """That leads from a point to its name; None where they stand close together."""
        (x, y), radius, distance = self.centres[entry], self.radii[entry], box.away(self.centres[entry])
        if distance <= radius + self.leader:
            return None
        end = box.nearest((x, y))
        return (x + radius / distance * (end[0] - x), y + radius / distance * (end[1] - y)), end

    def cost(self, entry: str, box: Box) -> float:
        """What speaks against a place for a name: what it covers, what its line crosses, strangers, distance."""
        wide = Box(box.left - 2, box.low - 1, box.right + 2, box.high + 1)
        discs = {name: Box.around(one, self.radii[name]) for name, one in self.centres.items()}
        away = {name: box.away(one) for name, one in self.centres.items()}
        cost = away[entry] + 1e4 * box.beyond(self.frame)
        cost += 50 * sum(wide.shared(one) for one in (*self.names, *discs.values()))
        cost += 30 * sum(wide.shared(one) > 0 for one in self.bars)
        cost += 20 * sum(one < away[entry] for one in away.values())
        cost += 400 * sum(wide.crossed(one) for one in self.lines)
        if (line := self.line(entry, box)) is not None:
            others = [one for name, one in discs.items() if name != entry and one.away(self.centres[entry])]
            cost += 400 * sum(one.crossed(line) for one in (*self.names, *others))
            cost += 300 * sum(_cross(line, one) for one in self.lines)
        return cost

    def place(self, entry: str, width: float, height: float) -> Box:
        """The best place for a name of that size, of many around its point."""
        return min(self._places(entry, width, height), key=lambda box: self.cost(entry, box))

    def _places(self, entry: str, width: float, height: float) -> Iterator[Box]:
        x, y = self.centres[entry]
        for distance, angle in AROUND:
            gap = self.radii[entry] + distance * height * 0.55
            across, upwards = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            left = x + gap * across + (0.5 * across - 0.5) * width
            low = y + gap * upwards + (0.5 * upwards - 0.5) * height
            yield Box(left, low, left + width, low + height)


def _name(axes: Axes, named: Sequence[Row], drawn: Sequence[Row], sizes: dict[str, float]) -> None:
    """Writes names beside points, the most crowded first."""
    scale, frame = axes.figure.dpi / 72, axes.bbox
    panel = Panel(
        Box(frame.x0, frame.y0, frame.x1, frame.y1),
        {row.entry: tuple(axes.transData.transform(_place(row))) for row in drawn},
        {row.entry: math.sqrt(sizes[row.entry] / math.pi) * scale for row in drawn},
        [bar for row in drawn for bar in _bars(axes, row)],
        LEADER * scale,
    )
    back = axes.transData.inverted()
    for row in sorted(named, key=lambda row: panel.room(row.entry)):
        text = axes.text(0, 0, row.entry, fontsize=9, zorder=5, verticalalignment="bottom")
        extent = text.get_window_extent()
        box = panel.place(row.entry, extent.width, extent.height)
        text.set_position(tuple(back.transform((box.left, box.low))))
        panel.names.append(box)
        if (line := panel.line(row.entry, box)) is not None:
            panel.lines.append(line)
            ends = zip(*back.transform(line), strict=True)
            axes.plot(*ends, color="0.35", linewidth=0.7, zorder=2.5, scalex=False, scaley=False)


def _bars(axes: Axes, row: Row) -> list[Box]:
    x, y = axes.transData.transform(_place(row))
    (left, low), (right, high) = axes.transData.transform(list(zip(*_ends(row), strict=True)))
    return [Box(left, y - 1, right, y + 1), Box(x - 1, low, x + 1, high)]


def _cross(one: tuple[Point, Point], other: tuple[Point, Point]) -> bool:
    """Whether two lines cross."""

    def side(p: Point, q: Point, r: Point) -> float:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    (a, b), (c, d) = one, other
    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0
