"""A comparison of methods, as plain facts: what was asked for, and its record, compare.json, which reports are of."""

from __future__ import annotations

import json
import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from afd._version import __version__
from afd.attacks.union import balls_in
from afd.config import LATER_OF_MODEL, TrainConfig
from afd.data import Splits
from afd.errors import InputError, look_up
from afd.evaluation.attacks import Epsilon
from afd.evaluation.command import exactly
from afd.evaluation.outcome import ResultsError
from afd.experiments.comparison.budget import seconds_in
from afd.experiments.comparison.report import write_all
from afd.experiments.comparison.rows import ENDED, ended
from afd.experiments.costs import Cost
from afd.files import check_source, write_whole
from afd.installation import needed_by
from afd.machine import device_with_threads
from afd.methods.registry import spelled
from afd.runtime import commit

with needed_by("afd.experiments.comparison.record"):
    import tomli_w

FORMAT, VERSION = "afd-comparison", 1
RECORD, TABLE = "compare.json", "table.toml"
PARTS = ("finished", "data", "ball", "network", "budget", "reference", "seeds", "entries")
PARENT = Path("runs/compare")  # of the folders that nobody named
IMAGES = 1000  # test images that are attacked where nobody says how many
REFERENCE = "at"
TRANSFERRED = "natural"  # the method whose models attacks are transferred from


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        words: of ``afd train``, that are the entry's own.
        config: the run, settled, but for what the comparison says of all: seed, epochs and folder.
    """

    words: str
    config: TrainConfig

    @property
    def method(self) -> str:
        """The name of its method."""
        assert self.config.method is not None
        return spelled(self.config.method)


@dataclass(frozen=True)
class Comparison:
    """What is compared, and at what cost.

    Attributes:
        entries: by name, in their order.
        timed: adversarial training on the same data, by whose steps a budget is measured.
        train: words of ``afd train`` for all.
        budget: a time, such as "5m", that each entry's training may take, if it were adversarial training; or None.
        epochs: of all entries, instead.
        passes: what the budget was measured to be, if it was.
        seeds: of which each entry has a run.
        images: of the test split, the first so many, that are attacked; None for 1000, or all where there are fewer.
        reference: the entry that others are paired with; None for "at", or the first one that attacks.
        left_out: entries whose method has no such option, by the option of `train`.
    """

    entries: Mapping[str, Entry]
    timed: TrainConfig
    train: str = ""
    budget: str | None = None
    epochs: int | None = None
    passes: float | None = None
    seeds: tuple[int, ...] = (0,)
    images: int | None = None
    reference: str | None = None
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def as_toml(self, content: Mapping[str, Any]) -> str:
        """A file that ``afd compare --config`` repeats this by, with what a record has found since."""
        asked = {"budget": self.budget} if self.epochs is None else {"epochs": self.epochs}
        passes = content["budget"]["passes"] if self.epochs is None else None
        table = {
            **asked,
            "seeds": content["seeds"],
            "images": content["data"]["images"],
            "reference": content["reference"],
            "train": self.train,
            **({} if passes is None else {"passes": passes}),
            "entries": {name: one["words"] for name, one in content["entries"].items()},
        }
        return f"# afd compare --config table.toml repeats this comparison\n{tomli_w.dumps(table)}"

    def told_left_out(self, entries: Collection[str]) -> str:
        """Which options for all these entries do without, in words; "" where they take all of them."""
        found = {option: [name for name in names if name in entries] for option, names in self.left_out.items()}
        return "; ".join(f"{option} ({', '.join(names)})" for option, names in found.items() if names)

    @property
    def asked(self) -> str:
        """The budget in words."""
        return str(self.budget) if self.epochs is None else f"{self.epochs} epoch{'s' * (self.epochs != 1)}"

    def completed(self, content: Mapping[str, Any] | None, test: int) -> Comparison:
        """The same with what was not said as it is in a record, or else by default.

        Args:
            content: of the record; None where there is none.
            test: images of the test split.

        Raises:
            InputError: the test split has fewer images, or no entry is called like the reference.
        """
        known = content or {}
        images = self.images if self.images is not None else look_up(known, "data", "images")
        images = min(IMAGES, test) if images is None else images
        if not 1 <= images <= test:
            name = self.timed.data.name
            raise InputError(f"images is {images}; the test split of {name} has images 1 ... {test} here")
        names = [*known.get("entries", {}), *self.entries]
        reference = self.reference or known.get("reference") or self._usual_reference()
        if reference not in names:
            raise InputError(f"reference is {reference!r}; allowed are the entries {', '.join(dict.fromkeys(names))}")
        passes = self.passes if self.passes is not None else look_up(known, "budget", "passes")
        return replace(self, images=images, reference=reference, passes=None if self.epochs is not None else passes)

    def _usual_reference(self) -> str:
        attacking = [name for name, entry in self.entries.items() if entry.method != TRANSFERRED]
        return REFERENCE if REFERENCE in self.entries else [*attacking, *self.entries][0]

    def differences(self, content: Mapping[str, Any]) -> list[str]:
        """What a record was made with that is other here, e.g. "budget is 5m there and 10m here"; entries may be new.

        Args:
            content: of the record.
        """
        here: dict[str, tuple[Any, Any]] = {
            "train": (content["train"], self.train),
            "budget": (content["budget"]["asked"], self.asked),
            "images": (content["data"]["images"], self.images),
            "reference": (content["reference"], self.reference),
        }
        epochs = _epochs_in(content["budget"]["asked"])
        if self.epochs is None and epochs is None:
            if seconds_in(content["budget"]["asked"]) == seconds_in(str(self.budget)):
                del here["budget"]
            here["passes"] = content["budget"]["passes"], self.passes
        elif self.epochs == epochs:
            del here["budget"]
        spelled_there = {name.lower(): name for name in content["entries"]}
        for name, entry in self.entries.items():
            here[f"the name of entry {name!r}"] = spelled_there.get(name.lower(), name), name
            if name in content["entries"]:
                here[f"entry {name!r}"] = content["entries"][name]["words"], entry.words
        told = [f"{name} is {there!r} there and {now!r} here" for name, (there, now) in here.items() if there != now]
        if not told:  # of all that words may leave to defaults
            facts = (("ball", _ball_as_json(self.timed)), ("network", _network_of(self.timed)))
            told = [f"{name} is {content[name]} there and {now} here" for name, now in facts if content[name] != now]
        return told


def _epochs_in(asked: str) -> int | None:
    """Those of a budget in words; None of a time."""
    number, _, unit = asked.partition(" ")
    return int(number) if unit.startswith("epoch") else None


def balls_of(config: TrainConfig) -> dict[Any, Epsilon]:
    """The radius in each norm that a settled run is judged in."""
    test = config.test
    if test.union is not None:
        return {norm: _radius(eps) for norm, eps in balls_in(test.union).items()}
    assert test.eps is not None
    return {test.norm: exactly(float(test.eps))}


def _radius(text: str) -> Epsilon:
    return exactly(float(Epsilon.of(text)))


def _ball_as_json(config: TrainConfig) -> dict[str, Any]:
    """The same in plain types."""
    balls = balls_of(config)
    if config.test.union is not None:
        return {"union": {norm: str(eps) for norm, eps in balls.items()}}
    ((norm, eps),) = balls.items()
    return {"norm": norm, "eps": float(eps), "text": str(eps)}


def _network_of(config: TrainConfig) -> dict[str, Any]:
    """The network of a settled run, in plain types."""
    model = config.model
    found = {one: getattr(model, one) for one in ("name", "width", "activation", "normalize")}
    return found | {name: getattr(model, name) for name, without in LATER_OF_MODEL.items() if name != "activation"
                    and getattr(model, name) != without}  # fmt: skip


def content_of(file: Path) -> dict[str, Any]:
    """What a compare.json holds, whatever the file is called.

    Raises:
        ResultsError: it cannot be read, is of another version, or lacks something.
    """
    check_source("results", file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ResultsError(f"{file} is not the result of afd compare")
    if content.get("version") != VERSION:
        raise ResultsError(f"{file} has version {content.get('version')}; this afd reads {VERSION}")
    if lacking := [part for part in PARTS if part not in content]:
        raise ResultsError(f"{file} is damaged: it lacks {', '.join(lacking)}")
    return content


def read_finished(folder: Path) -> dict[str, Any]:
    """What a finished comparison's compare.json holds.

    Args:
        folder: of the comparison, or the file itself.

    Raises:
        ResultsError: it cannot be read, or the comparison is not finished.
    """
    check_source("results", folder)
    content = content_of(folder / RECORD if folder.is_dir() else folder)
    if not ended(content):
        raise ResultsError(f"{folder} holds a comparison that is not finished; run it to its end first")
    return content


class Record:
    """compare.json of a folder, rewritten whole, with its reports, after each thing that is finished.

    Args:
        folder: of the comparison.
        content: what it says.
    """

    def __init__(self, folder: Path, content: dict[str, Any]) -> None:
        self.folder, self.content = folder, content

    @classmethod
    def begun(cls, folder: Path, asked: Comparison, splits: Splits[Any], speed: float | None, device: Any) -> Record:
        """One in which nothing is done yet, of a completed comparison; not written yet."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "finished": False,
            "data": {
                "name": asked.timed.data.name,
                "images": asked.images,
                "classes": splits.test.num_classes,
                "train": len(splits.train),
                "validation": len(splits.validation),
            },
            "ball": _ball_as_json(asked.timed),
            "network": _network_of(asked.timed),
            "train": asked.train,
            "budget": {"asked": asked.asked, "passes": asked.passes, "at_images_per_second": speed},
            "reference": asked.reference,
            "seeds": [],
            "entries": {},
            "machine": {"device": device_with_threads(device), "system": platform.system()},
            "versions": {"afd": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "commit": commit(),
        }
        return cls(folder, content)

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """That of a folder; None where there is none.

        Raises:
            ResultsError: as of `content_of`.
        """
        return cls(folder, content_of(folder / RECORD)) if (folder / RECORD).exists() else None

    @property
    def entries(self) -> dict[str, Any]:
        """What is known of each, by name."""
        entries: dict[str, Any] = self.content["entries"]
        return entries

    def add(self, name: str, entry: Entry, cost: Cost) -> None:
        """An entry that joins."""
        self.entries[name] = {
            "words": entry.words,
            "method": entry.method,
            "passes_per_image": cost.per_image,
            "epochs": cost.epochs,
            "epoch_images": cost.epoch_images,
            "passes": cost.passes,
            "runs": {},
        }

    def without_unbegun(self, asked: Collection[str]) -> None:
        """Forgets entries that are not asked for any more and of which nothing has begun, as of one mistyped."""
        begun = {path.name for path in self.folder.iterdir()}
        for name, entry in list(self.entries.items()):
            waits = all(run["state"] == "waiting" for run in entry["runs"].values()) and name not in begun
            if waits and name not in (*asked, self.content["reference"]):
                del self.entries[name]

    def has_seeds(self, seeds: tuple[int, ...]) -> None:
        """Gives each entry a run of each of these seeds, beside those that it has."""
        self.content["seeds"] = sorted({*self.content["seeds"], *seeds})
        for entry in self.entries.values():
            for seed in self.content["seeds"]:
                entry["runs"].setdefault(str(seed), waiting())

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """What is known of an entry's run."""
        found: dict[str, Any] = self.entries[name]["runs"][str(seed)]
        return found

    def runs(self) -> list[dict[str, Any]]:
        """All of them."""
        return [run for entry in self.entries.values() for run in entry["runs"].values()]

    def write(self) -> None:
        """Writes compare.json, and all that is made of it.

        Raises:
            FileError: one cannot be written.
        """
        self.content["finished"] = all(run["state"] in ENDED for run in self.runs())
        write_whole(self.folder / RECORD, json.dumps(self.content, indent=1, ensure_ascii=False) + "\n")
        write_all(self.folder, self.content)


def waiting() -> dict[str, Any]:
    """What is known of a run that has not begun; `made`: on what machine, by which versions and commit it was done."""
    nothing: dict[str, Any] = {"seconds": None, "alarms": [], "measured": {}, "evaluation": None, "made": None}
    return {"state": "waiting", "error": None, **nothing}
