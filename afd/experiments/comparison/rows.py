"""What a comparison of methods found, row by row: figures with their intervals, differences from the reference, costs.

Everything that shows a comparison (`report`, `picture`) shows these rows, made of what compare.json holds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from afd.attacks.ball import NORMS
from afd.experiments.display import duration
from afd.experiments.train import TEST_STEPS
from afd.metrics import interval, paired_interval, unpacked

Content = Mapping[str, Any]  # of compare.json
PGD, TRANSFER = f"pgd-{TEST_STEPS}", "transfer"  # stages, beside those of AutoAttack
FIGURES = {  # in compare.json, and in words
    "clean": "clean", PGD: PGD.upper(), "autoattack": "AutoAttack", TRANSFER: "transfer", "worst": "worst case",
}  # fmt: skip
PAIRED = ("clean", "autoattack")  # figures whose difference from the reference is told
ENDED = ("done", "failed")
MADE = ("machine", "versions", "commit")  # facts of a comparison, and of each run of it


@dataclass(frozen=True)
class Estimate:
    """A number with its interval over images and, where it is a mean over seeds, what each of these has.

    Attributes:
        value: of all seeds together.
        low, high: 95% interval over images.
        seeds: what each of several seeds has; none of a single one.
    """

    value: float
    low: float
    high: float
    seeds: tuple[float, ...] = ()

    sign: ClassVar[str] = ""  # "+" where it may be either way

    @property
    def deviation(self) -> float:
        """The standard deviation over several seeds."""
        return statistics.stdev(self.seeds)

    @property
    def text(self) -> str:
        """The value, times 100."""
        return self._percent(self.value)

    def span(self, digits: int = 2) -> str:
        """The interval over images, times 100."""
        return f"{self._percent(self.low, digits)} to {self._percent(self.high, digits)}"

    def range(self, digits: int = 2) -> str:
        """The least and the largest of several seeds, times 100."""
        return f"{self._percent(min(self.seeds), digits)} to {self._percent(max(self.seeds), digits)}"

    def _percent(self, number: float, digits: int = 2) -> str:
        return f"{100 * number:{self.sign}.{digits}f}"


class Figure(Estimate):
    """A share of images in [0, 1], or the mean of one over seeds.

    The interval of a mean is Wilson's, too, which for shares of hits is no narrower than it should be.
    """

    @classmethod
    def of(cls, share: float | None, images: int) -> Figure | None:
        """What was measured on so many images; None where nothing was."""
        return None if share is None else cls(share, *interval(share * images, images))

    @classmethod
    def mean(cls, shares: Sequence[float | None], images: int) -> Figure | None:
        """Over seeds, of so many images; None unless all have one."""
        known = [share for share in shares if share is not None]
        if not known or len(known) < len(shares):
            return None
        value = statistics.fmean(known)
        return cls(value, *interval(value * images, images), tuple(known))


class Difference(Estimate):
    """The share of images, in [-1, 1], that an entry gets right more than the reference; its interval is paired."""

    sign = "+"

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    @property
    def text(self) -> str:
        """In percentage points; a star says that the interval excludes 0."""
        return f"{super().text}{' *' if self.clear else ''}"


@dataclass(frozen=True)
class Row:
    """What one seed of an entry came to, or the mean over its seeds.

    Attributes:
        entry: its name.
        seed: None for a mean.
        seeds: how many it is of.
        state: "waiting", "trained", "done" or "failed".
        told: what there is to say of a run that is not done.
        figures: by the names of `FIGURES`; None where not measured.
        differences: from the reference, by those of `PAIRED`; empty for the reference itself.
        passes: of an image through the network in all of its training, as `budget.Cost` has them; None where nobody
            can count them.
        seconds: of training, on the wall; None before it is done.
        verdict: of the checks, "" before they are made.
        failed: names of the checks that failed.
        warned: names of those that warned.
        alarms: what went wrong in training, a kind each with its epochs.
        chance: the share of images that guessing gets right.
    """

    entry: str
    seed: str | None
    seeds: int = 1
    state: str = "done"
    told: str = ""
    figures: dict[str, Figure | None] = field(default_factory=dict)
    differences: dict[str, Difference] = field(default_factory=dict)
    passes: float | None = None
    seconds: float | None = None
    verdict: str = ""
    failed: tuple[str, ...] = ()
    warned: tuple[str, ...] = ()
    alarms: tuple[str, ...] = ()
    chance: float = 0.0

    @property
    def at_chance(self) -> bool:
        """Whether clean accuracy is no more than guessing has, as far as the images tell."""
        clean = self.figure("clean")
        return clean is not None and clean.low <= self.chance

    @property
    def name(self) -> str:
        """What tables call it; a dagger says that checks failed."""
        seed = f", mean of {self.seeds} seeds" if self.seed is None else f", seed {self.seed}" if self.seeds > 1 else ""
        return f"{self.entry}{seed}{' †' if self.verdict == 'fail' else ''}"

    @property
    def checks(self) -> str:
        """The verdict, and what failed or else warned; whether it is of a model that guesses."""
        named = self.failed or self.warned
        told = f"{self.verdict}: {', '.join(named)}" if named else self.verdict
        return f"{told}; clean accuracy is at chance" if told and self.at_chance else told or "-"

    @property
    def time(self) -> str:
        """How long training took, in words."""
        return "-" if self.seconds is None else duration(self.seconds)

    def figure(self, name: str) -> Figure | None:
        """One of them."""
        return self.figures.get(name)


def ended(content: Content) -> bool:
    """Whether each run of a comparison is done or has failed."""
    runs = [run for entry in content["entries"].values() for run in entry["runs"].values()]
    return bool(content["finished"]) or (bool(runs) and all(run["state"] in ENDED for run in runs))


def rows_of(content: Content) -> list[Row]:
    """A row for each seed of each entry; below those of an entry with several that are done, their mean."""
    rows = []
    for name, entry in content["entries"].items():
        single = [_row(content, name, seed) for seed in entry["runs"]]
        rows += single
        done = [row.seed for row in single if row.state == "done" and row.seed is not None]
        if len(done) > 1:
            rows.append(_mean(content, name, done, single))
    return rows


def points_of(content: Content) -> list[Row]:
    """One row for each entry that something is known of: its mean, or else its only seed that is done."""
    best: dict[str, Row] = {}
    for row in rows_of(content):
        if row.state == "done" and (row.entry not in best or row.seed is None):
            best[row.entry] = row
    return [row for row in best.values() if row.figure("clean") and row.figure("autoattack")]


def ball_of(content: Content) -> str:
    """What attacks were bounded by, in words."""
    ball = content["ball"]
    if "union" in ball:
        return "the union of " + ", ".join(f"{NORMS[norm].sign} ε = {eps}" for norm, eps in ball["union"].items())
    return f"{NORMS[ball['norm']].sign} ε = {ball['text']}"


def checkpoints_of(content: Content) -> list[tuple[str, str, int, Figure | None, Figure | None]]:
    """(row's name, checkpoint, epoch, clean, PGD-40) of the best, last and averaged weights of each seed."""
    images, found = content["data"]["images"], []
    for name, entry in content["entries"].items():
        for seed, run in entry["runs"].items():
            row = Row(name, seed, len(entry["runs"]))
            for checkpoint, one in (run.get("measured") or {}).items():
                clean, robust = (Figure.of(one.get(figure), images) for figure in ("natural", "robust"))
                found.append((row.name, checkpoint, one["epoch"], clean, robust))
    return found


def _row(content: Content, name: str, seed: str) -> Row:
    entry, images = content["entries"][name], content["data"]["images"]
    run = entry["runs"][seed]
    evaluation = run.get("evaluation") or {}
    checks = evaluation.get("checks", [])
    told = {"waiting": "waiting", "trained": "trained, not attacked yet", "done": ""}
    failed, warned = (tuple(one["name"] for one in checks if one["verdict"] == kind) for kind in ("fail", "warn"))
    return Row(
        entry=name, seed=seed, seeds=len(entry["runs"]), state=run["state"],
        told=told.get(run["state"], f"failed: {run.get('error') or 'it did not say why'}"),
        figures={figure: Figure.of(evaluation.get(figure), images) for figure in FIGURES},
        differences=differences(content, name, [seed]),
        passes=entry.get("passes"), seconds=run.get("seconds"), verdict=evaluation.get("verdict", ""),
        failed=failed, warned=warned, alarms=alarms_of(run), chance=1 / content["data"]["classes"],
    )  # fmt: skip


def _mean(content: Content, name: str, seeds: Sequence[str], single: Sequence[Row]) -> Row:
    entry, images = content["entries"][name], content["data"]["images"]
    runs, rows = [entry["runs"][seed] for seed in seeds], [row for row in single if row.seed in seeds]
    verdicts = [row.verdict for row in rows]
    known = [run["seconds"] for run in runs if run.get("seconds") is not None]
    return Row(
        entry=name, seed=None, seeds=len(seeds),
        figures={figure: Figure.mean([run["evaluation"].get(figure) for run in runs], images) for figure in FIGURES},
        differences=differences(content, name, seeds),
        passes=entry.get("passes"), seconds=statistics.fmean(known) if known else None,
        verdict=next((one for one in ("fail", "warn", "pass") if one in verdicts), ""),
        failed=tuple(dict.fromkeys(check for row in rows for check in row.failed)),
        warned=tuple(dict.fromkeys(check for row in rows for check in row.warned)),
        alarms=tuple(dict.fromkeys(alarm for row in rows for alarm in row.alarms)),
        chance=1 / content["data"]["classes"],
    )  # fmt: skip


def differences(content: Content, name: str, seeds: Sequence[str]) -> dict[str, Difference]:
    """An entry's differences from the reference, image by image, over those of the seeds that both have done.

    Of several seeds, each image counts with the mean over them; where they share none, there is no difference.
    """
    reference, images = content["reference"], content["data"]["images"]
    if name == reference or reference not in content["entries"]:
        return {}
    found = {}
    for figure in PAIRED:
        pairs = [
            (mine, theirs)
            for seed in seeds
            if (mine := _withstood(content, name, seed, figure)) is not None
            and (theirs := _withstood(content, reference, seed, figure)) is not None
        ]
        if pairs:
            a, b = (torch.stack(of).double().mean(0) for of in zip(*pairs, strict=True))
            each = [float((mine.double() - theirs.double()).sum()) / images for mine, theirs in pairs]
            several = tuple(each) if len(each) > 1 else ()
            found[figure] = Difference(float((a - b).sum()) / images, *paired_interval(a, b), several)
    return found


def _withstood(content: Content, name: str, seed: str, figure: str) -> Tensor | None:
    """Which images one seed of an entry gets right; None where that is not known."""
    run = content["entries"][name]["runs"].get(seed) or {}
    text = ((run.get("evaluation") or {}).get("withstood") or {}).get(figure)
    return None if text is None else unpacked(text, content["data"]["images"])


def alarms_of(run: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds of a run's alarms, each with the epochs it went off in."""
    epochs: dict[str, list[int]] = {}
    for alarm in run.get("alarms") or ():
        epochs.setdefault(alarm["kind"], []).append(alarm["epoch"])
    spans = {kind: (min(of), max(of)) for kind, of in epochs.items()}
    return tuple(f"{kind} (epoch {f'{a}' if a == b else f'{a} to {b}'})" for kind, (a, b) in spans.items())


def amount(number: float | None) -> str:
    """A large number in few characters."""
    if number is None:
        return "-"
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{sign}"
    return f"{number:.0f}"
