"""The runs of a comparison: how each is trained, measured and gone on with, and what compare.json says of it."""

from __future__ import annotations

import dataclasses
import json
import math
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from afd.attacks import Norm
from afd.config import TrainConfig
from afd.data import Images, Splits
from afd.errors import AfdError, InputError, in_a_line, out_of_memory
from afd.evaluation import protocol as protocols
from afd.evaluation.attacks import Epsilon, Stage
from afd.evaluation.command import load
from afd.evaluation.folder import evaluate_to_folder
from afd.evaluation.model import Model
from afd.evaluation.outcome import RESULTS, read_results
from afd.evaluation.protocol import Protocol
from afd.evaluation.store import STATE
from afd.experiments.comparison.budget import seconds_in
from afd.experiments.comparison.record import TRANSFERRED, Comparison, Record, balls_of, waiting
from afd.experiments.comparison.rows import PGD, TRANSFER
from afd.experiments.display import duration, read_log
from afd.experiments.train import TEST_STEPS, AlarmError, draw, train
from afd.installation import needed_by
from afd.metrics import packed, unpacked
from afd.training.settings import differences
from afd.training.signals import StoppedError

with needed_by("afd compare"):
    from rich.console import Console

RESULT, RUN = "result.json", "run.toml"
PRECISION = "fp32"  # of all measurements, whatever the runs were trained in, as of published figures
GO_ON = "the same command goes on from there"


def say(console: Console, line: str) -> None:
    """Prints a line as it is."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def measured_by(config: TrainConfig, *, transfer: bool) -> Protocol:
    """AutoAttack, PGD-40 and the probes, in each ball that a settled run is judged in.

    Args:
        config: the run.
        transfer: whether PGD-40 is made on another model as well.
    """
    balls = balls_of(config)
    if config.test.union is None:
        ((norm, eps),) = balls.items()
        found = _in_ball(norm, (eps,), eps)
    else:
        found = protocols.in_union(_in_ball, balls)
    several = len(balls) > 1
    transferred = [
        Stage(f"{TRANSFER}-{norm.lower()}" if several else TRANSFER, "pgd", norm, (eps,), {"steps": TEST_STEPS},
              "correct", "transfer")
        for norm, eps in balls.items()
    ]  # fmt: skip
    return dataclasses.replace(found, stages=(*found.stages, *transferred)) if transfer else found


def _in_ball(norm: Norm, epsilons: Any, reference: Epsilon) -> Protocol:
    """AutoAttack and PGD-40 in a ball, with the probes that neither serves as."""
    cascade = [one for one in protocols.autoattack(norm, epsilons, reference).stages if one.role == "score"]
    stages = (*cascade, Stage(PGD, "pgd", norm, tuple(epsilons), {"steps": TEST_STEPS}))
    return Protocol("autoattack", norm, reference, stages + protocols.probes(norm, reference, stages))


def check_protocol(config: TrainConfig, images: Images) -> None:
    """Raises InputError if a trained model could not be measured so, in its ball, on such images."""
    found = measured_by(config, transfer=False).for_classes(images.num_classes)
    found.check_stages()
    found.check_radii(math.prod(images.shape))


def outcome_of(results: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What compare.json says of an evaluation, from its results.json.

    Args:
        results: its content.
        folder: where it lies, as seen from the comparison's.
    """
    images, seen = results["data"]["count"], results["withstood"]
    stages = {
        name: [unpacked(one, images) for one in radii.values()] for name, radii in seen["stages"].items()
    }  # of one radius each
    found = {
        PGD: [one for name, held in stages.items() if name.startswith(PGD) for one in held],
        TRANSFER: [one for name, held in stages.items() if name.startswith(TRANSFER) for one in held],
        "autoattack": [one for name, held in stages.items() if not name.startswith((PGD, TRANSFER)) for one in held],
        "worst": [unpacked(one, images) for radii in seen["worst_case"].values() for one in radii.values()],
    }
    bits = {"clean": unpacked(seen["clean"], images)}
    bits |= {name: torch.stack(held).all(0) for name, held in found.items() if held}
    return {
        "folder": folder.as_posix(),
        **{name: float(bits[name].double().mean()) if name in bits else None for name in ("clean", *found)},
        "verdict": results["verdict"],
        "checks": results["checks"],
        "seconds": sum(one["seconds"] for one in results["attacks"]),
        "withstood": {name: packed(one) for name, one in bits.items()},
    }


# --- What there is of a run -------------------------------------------------------------------------------------------


def finished(config: TrainConfig, *, whole: bool = True) -> dict[str, Any] | None:
    """What result.json says of a run that has ended; None where it has not.

    Args:
        config: the run, settled.
        whole: whether one that an alarm has stopped before its last epoch counts as not ended.

    Raises:
        InputError: another run lies in its folder.
    """
    assert config.out is not None
    file, kept = config.out / RESULT, config.out / RUN
    if not (file.exists() and kept.exists()):
        return None
    if kept.read_text() != config.as_toml():
        there = TrainConfig.read(kept).settled().as_json()
        other = differences(there, config.as_json(), ("out", "overwrite", "resume"))
        if other:
            raise InputError(f"{config.out} holds another run: {'; '.join(other)}")
    result: dict[str, Any] = json.loads(file.read_text())
    return None if whole and result["measured"]["last"]["epoch"] != config.epochs else result


def training_of(config: TrainConfig, images: int) -> dict[str, Any]:
    """What compare.json says of the training of a run that has ended.

    Args:
        config: the run, settled.
        images: that there are to train on.
    """
    assert config.out is not None
    assert config.method is not None
    result = finished(config, whole=False)
    assert result is not None
    steps = (config.data.epoch_images or images) * config.method.repeats  # of an image, in an epoch
    speeds = [one["images_per_second"] for one in read_log(config.out) if one["kind"] == "epoch"]
    seconds = sum(steps / speed for speed in speeds)
    return {"seconds": seconds, "alarms": result["alarms"], "measured": result["measured"]}


def evaluated(folder: Path, model: Model, protocol: Protocol, classes: int) -> dict[str, Any] | None:
    """The results of a finished evaluation of this very model by a protocol; None where there are none in the folder.

    Args:
        folder: of the evaluation.
        model: the model.
        protocol: how it is measured.
        classes: of the data.
    """
    if not (folder / RESULTS).exists() or (folder / STATE).exists():
        return None
    results = read_results(folder)
    expected = json.loads(json.dumps(protocol.for_classes(classes).as_json()))  # as it is read back
    same = results["protocol"] == expected and "withstood" in results and results["precision"]["asked"] == PRECISION
    return results if same and results["subject"]["sha256"] == model.digest() else None


# --- All of them -----------------------------------------------------------------------------------------------------


@dataclass
class Runs:
    """A comparison at work.

    Attributes:
        asked: what is compared.
        record: what is done of it.
        splits: the data, whose test part are the images that are attacked.
        device: where to.
        console: where to print.
        models: natural ones that attacks are transferred from, by seed.
    """

    asked: Comparison
    record: Record
    splits: Splits[Any]
    device: torch.device
    console: Console
    models: dict[int, Model] = field(default_factory=dict)

    def run(self) -> None:
        """All that is not done yet, seed by seed; what fails is noted."""
        names = sorted(self.asked.entries, key=lambda name: self.asked.entries[name].method != TRANSFERRED)
        order = [(name, seed) for seed in self.record.content["seeds"] for name in names]
        for number, (name, seed) in enumerate(order, 1):
            run = self.record.run(name, seed)
            config = self.config_of(name, seed)
            if run["state"] == "done" and self._still_there(config):
                continue
            self.record.run(name, seed).update(waiting())
            say(self.console, f"[{number}/{len(order)}] {name}, seed {seed}{self._left(name)}")
            try:
                self.train(name, seed, config)
                self.evaluate(name, seed, config)
            except StoppedError as stopped:
                raise stopped.advised(GO_ON) from None
            except Exception as error:  # of somebody's own method, too: the others go on
                if not (isinstance(error, AfdError) or out_of_memory(error)):
                    traceback.print_exc()
                run.update({"state": "failed", "error": in_a_line(error)})
                say(self.console, f"{name}, seed {seed} has failed: {run['error']}")
                self.record.write()
        self._tell_without_transfer()

    def config_of(self, name: str, seed: int) -> TrainConfig:
        """An entry's run of a seed, as `afd train` takes it."""
        entry, config = self.record.entries[name], self.asked.entries[name].config
        if self.asked.epochs is None:
            config = dataclasses.replace(
                config, data=dataclasses.replace(config.data, epoch_images=entry["epoch_images"])
            )
        out = self.record.folder / name / f"seed-{seed}"
        resume = "auto" if out.exists() else None
        return dataclasses.replace(config, epochs=entry["epochs"], seed=seed, out=out, resume=resume).settled()

    def train(self, name: str, seed: int, config: TrainConfig) -> None:
        """Trains, or goes on, or finds that it is finished; notes what came of it."""
        assert config.out is not None
        run = self.record.run(name, seed)
        if finished(config) is None:
            try:
                train(config, self.console, self.splits, advised=self.record.folder)
            except AlarmError:
                run.update(training_of(config, len(self.splits.train)))
                raise
        elif not (config.out / "curves.png").exists():  # its process was ended between the two
            draw(config.out / "curves.png", name)
        run.update({"state": "trained", "error": None, **training_of(config, len(self.splits.train))})
        self.record.write()

    def evaluate(self, name: str, seed: int, config: TrainConfig) -> None:
        """Measures the checkpoint that validation has chosen, or finds that it is measured; notes what came of it."""
        assert config.out is not None
        run, folder = self.record.run(name, seed), config.out / "evaluation"
        model = load(str(config.out / "best.pt"), self.device)
        surrogate = None if self.asked.entries[name].method == TRANSFERRED else self._surrogate(seed)
        protocol = measured_by(config, transfer=surrogate is not None)
        results = evaluated(folder, model, protocol, self.splits.test.num_classes)
        if results is None:
            results = evaluate_to_folder(
                model, self.splits.test, protocol, folder, surrogate=surrogate, precision=PRECISION, overwrite=True,
                console=self.console,
            )  # fmt: skip
            assert results is not None
        run["evaluation"] = outcome_of(results, folder.relative_to(self.record.folder))
        trained = finished(config)
        assert trained is not None
        run["made"] = {name: results[name] for name in ("machine", "versions")} | {"commit": trained["commit"]}
        run.update({"state": "done", "error": None})
        self.record.write()

    def _natural(self, seed: int) -> str | None:
        """The entry of natural training whose run of a seed is finished, if there is one."""
        naturals = (name for name, entry in self.record.entries.items() if entry["method"] == TRANSFERRED)
        return next((name for name in naturals if self.record.run(name, seed)["state"] == "done"), None)

    def _surrogate(self, seed: int) -> Model | None:
        """The model of that run, which attacks are transferred from."""
        name = self._natural(seed)
        if name is not None and seed not in self.models:
            self.models = {seed: load(str(self.record.folder / name / f"seed-{seed}" / "best.pt"), self.device)}
        return None if name is None else self.models[seed]

    def _tell_without_transfer(self) -> None:
        """Says which were measured before there was a natural model to transfer attacks from."""
        without = [
            f"{name} (seed {seed})"
            for name, entry in self._asked.items()
            for seed, run in entry["runs"].items()
            if entry["method"] != TRANSFERRED
            and run["state"] == "done"
            and run["evaluation"]["transfer"] is None
            and self._natural(int(seed)) is not None
        ]
        if without:
            say(
                self.console,
                f"measured before {TRANSFERRED} was there, and so without attacks from it: {', '.join(without)}; the "
                "same command measures again what has no folder 'evaluation'",
            )

    def _still_there(self, config: TrainConfig) -> bool:
        """Whether what the record calls done lies in its folder."""
        assert config.out is not None
        return (config.out / RESULT).exists() and (config.out / "evaluation" / RESULTS).exists()

    @property
    def _asked(self) -> dict[str, Any]:
        """What is known of the entries that are asked for; the record may have others."""
        return {name: self.record.entries[name] for name in self.asked.entries}

    def _left(self, name: str) -> str:
        """About how long this training takes, and all that is left to do, as far as that can be told yet."""
        entries, known = self._asked, self.record.runs()
        seconds = sum(run["seconds"] for run in known if run["seconds"])
        passes = sum(
            entry["passes"] or 0.0
            for entry in self.record.entries.values()
            for run in entry["runs"].values()
            if run["seconds"]
        )
        of_pass = seconds / passes if passes else self._of_pass()
        if of_pass is None or any(entry["passes"] is None for entry in entries.values()):
            return ""
        own = entries[name]["passes"] * of_pass
        tests = [run["evaluation"]["seconds"] for run in known if run["evaluation"] is not None]
        test = sum(tests) / len(tests) if tests else 0.0
        states = {one: [run["state"] for run in entry["runs"].values()] for one, entry in entries.items()}
        training = sum(
            entries[one]["passes"] * of_pass * sum(state in ("waiting", "failed") for state in found)
            for one, found in states.items()
        )
        left = training + test * sum(state != "done" for found in states.values() for state in found)
        without = "" if tests else ", attacks on the test images not counted yet"
        return f": training takes about {duration(own)}; left in all: about {duration(left)}{without}"

    def _of_pass(self) -> float | None:
        """Seconds of a pass, as the budget was measured."""
        budget = self.record.content["budget"]
        asked = self.asked.budget if self.asked.epochs is None else None
        return None if asked is None or not budget["passes"] else seconds_in(asked) / float(budget["passes"])
