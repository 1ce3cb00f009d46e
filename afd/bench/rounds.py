"""One AFD training round beside one of the released code: ``afd bench round``.

Both attack the same batch with Auto-PGD of as many steps, then play AFD-WGAN with SGD. On CUDA afd's round is also
timed as ``afd train --graph`` plays it: attack, passes and optimizers recorded as one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from afd.bench import at_work
from afd.bench.document import Candidate, Figure
from afd.bench.document import Case as Measured
from afd.bench.peers import PEERS
from afd.bench.program import Benchmark, Say, listed, reached
from afd.bench.round_candidates import (
    CASES,
    OUTSIDE,
    WHOLE,
    Case,
    Played,
    RecordingError,
    case,
    ours,
    recorded,
    released,
)
from afd.bench.show import Column
from afd.bench.timing import Timing, interleaved
from afd.errors import count

RELEASED = "released"
PRECISIONS, SCHEDULES = ("fp32", "auto"), ("simultaneous", "alternating")
WARMUP = {"cpu": 1, "cuda": 3}  # calls: a graph is recorded in the second, and its memory settles in the third
OUTSIDE_BAR = 2.0  # the released time outside the attack over ours


def candidates(case: Case, schedules: Sequence[str], precisions: Sequence[str], graphs: bool) -> dict[str, Played]:
    """All ways to play the round by name, afd's also as one graph if that is asked for."""
    found = {RELEASED: released(case)}
    for schedule in schedules:
        for precision in precisions:
            name = f"afd {schedule} {precision}"
            found[name] = ours(case, precision, schedule)
            if graphs:
                found[f"{name} graph"] = recorded(case, precision, schedule)
    return found


def measure(
    played: Mapping[str, Played], rounds: int, warmup: int, device: torch.device
) -> Iterator[tuple[str, dict[str, Timing]]]:
    """Times of whole rounds, then of what comes after the attack, by candidate."""
    for i, part in enumerate((WHOLE, OUTSIDE)):
        at_work.begin(part)
        calls = {name: parts[i] for name, parts in played.items()}
        yield part, interleaved(calls, rounds, warmup, device)


@dataclass(frozen=True, kw_only=True)
class RoundBench(Benchmark):
    """One training round of AFD beside one of the released code."""

    name = "round"
    columns = (Column("times as fast as released", "speedup"), Column("outside the attack", "share", "{:.0%}"))

    case: Literal["small", "resnet18"] = "small"
    """Network and images: a small net on 1x28x28, or ResNet-18 on 3x32x32."""
    batch: int = 128
    """Images a batch."""
    steps: int = 10
    """Of the attack."""
    schedules: str = "simultaneous"
    """simultaneous, alternating; comma-separated."""
    precisions: str = ",".join(PRECISIONS)
    """fp32, auto; comma-separated."""

    @property
    def subject(self) -> str:
        """The network."""
        return self.case

    @property
    def settings(self) -> Mapping[str, Figure]:
        """Network, images and attack."""
        return {"case": self.case, "batch": self.batch, "steps": self.steps, "eps": CASES[self.case][3]}

    @property
    def packages(self) -> Iterable[str]:
        """The released flow's attack."""
        return [PEERS["pyautoattack"].package]

    def check(self) -> None:
        """Counts and names, too."""
        super().check()
        count("batch", self.batch, 1)
        count("steps", self.steps, 1)
        self._asked()

    def _asked(self) -> tuple[list[str], list[str]]:
        """Schedules and precisions."""
        return listed("schedules", self.schedules, SCHEDULES), listed("precisions", self.precisions, PRECISIONS)

    def measure(self, device: torch.device, say: Say) -> Iterator[tuple[str, Measured]]:
        """Two cases: whole rounds, and what of them comes after the attack; then the first with the second's share.

        Raises:
            RecordingError: a round could not be recorded; after all others have been timed.
        """
        schedules, precisions = self._asked()
        at_work.begin(f"building {self.case}")
        chosen = case(self.case, self.batch, self.steps, device)
        played = candidates(chosen, schedules, precisions, graphs=device.type == "cuda")
        refused = left_out(played, say)
        times: dict[str, dict[str, Timing]] = {}
        for part, taken in measure(played, self.rounds, WARMUP[device.type], device):
            times[part] = taken
            yield part, measured(part, times)
        yield WHOLE, measured(WHOLE, times)
        if refused:
            raise refused[0]

    def remarks(self, cases: Mapping[str, Measured]) -> Iterable[str]:
        """Which bars each candidate reaches."""
        bars = CASES[self.case][-1]
        for name in [other for other in cases[WHOLE].candidates if other != RELEASED]:
            _, _, precision, *_ = name.split()
            bar = getattr(bars, precision)
            theirs, own = (
                [cases[part].candidates[who].median for part in (WHOLE, OUTSIDE)] for who in (RELEASED, name)
            )
            whole, outside = (slow / fast for slow, fast in zip(theirs, own, strict=True))
            met = {f"{bar:g}x the released round": whole >= bar, f"{OUTSIDE_BAR:g}x outside": outside >= OUTSIDE_BAR}
            yield f"{name}: {reached(met)}"


def left_out(played: dict[str, Played], say: Say) -> list[RecordingError]:
    """Takes out, with a word, the graphs that cannot be recorded: the others are worth timing all the same."""
    refused = []
    for name in [name for name in played if name.endswith("graph")]:
        try:
            for part in played[name]:
                part(), part()  # the second records
        except RecordingError as error:
            say(f"left out: {error}")
            refused.append(error)
            del played[name]
    return refused


def measured(part: str, times: Mapping[str, Mapping[str, Timing]]) -> Measured:
    """A case of the document, from the times by part and candidate that are known so far."""
    return Measured({}, {name: Candidate(taken, _figures(name, part, times)) for name, taken in times[part].items()})


def _figures(name: str, part: str, times: Mapping[str, Mapping[str, Timing]]) -> dict[str, Figure]:
    known = part == WHOLE and OUTSIDE in times
    share = times[OUTSIDE][name].p50 / times[WHOLE][name].p50 if known else None
    return {"speedup": times[part][RELEASED].p50 / times[part][name].p50, "share": share}
