"""One evaluation: what is checked before it starts, how it is run, and `evaluate`, one call for a model and tensors."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from afd._version import __version__
from afd.attacks import NORMS, Norm
from afd.attacks.external import BOUNDS, ordinary_modes
from afd.attacks.inputs import check_form, largest_label
from afd.data import Images
from afd.errors import InputError, InputTypeError, one_of
from afd.evaluation.attacks import Epsilon, Stage
from afd.evaluation.checks import (
    VERDICTS,
    Check,
    finite_check,
    model_checks,
    outcome_checks,
    overall,
    precision_check,
    verification_check,
)
from afd.evaluation.confirm import Confirmation, Silent, confirm, confirmed_in_words
from afd.evaluation.model import Given, Model, check_fit, check_metadata, domain_counter, feature_summary
from afd.evaluation.outcome import divergences, summarize
from afd.evaluation.protocol import PROBED, Protocol, autoattack, quick
from afd.evaluation.runner import Meter, Runner, other_batch_size, verify
from afd.evaluation.store import MemoryStore, Store
from afd.metrics import spanned
from afd.nn.modes import local
from afd.runtime import Group, device_named

PRECISIONS = ("fp32", "auto")
TRANSFER_STEPS = 40  # of PGD on each surrogate


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that can start: `prepare` has found nothing wrong with it.

    Attributes:
        model: what is evaluated.
        surrogates: models that transfer stages attack.
        images: what is attacked, on the device of the group.
        protocol: how, for a model of so many classes.
        classes: of the model.
        looked: what the model alone, and a few clean images, show.
        seed: of all attacks.
        batch_size: images that are attacked together.
        precision: that attacks run in, "fp32" or "auto".
        group: device and share of the work.
    """

    model: Model
    surrogates: tuple[Model, ...]
    images: Images
    protocol: Protocol
    classes: int
    looked: tuple[Check, ...]
    seed: int
    batch_size: int
    precision: str
    group: Group

    @property
    def settings(self) -> dict[str, Any]:
        """What a result names, and an unfinished evaluation goes on with."""
        told = {} if self.precision == "fp32" else {"precision": self.precision}
        return {"seed": self.seed, "batch_size": self.batch_size, **told}

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for an unfinished evaluation to go on."""
        pixels = hashlib.sha256(self.images.pixels.cpu().contiguous().numpy().tobytes())
        pixels.update(self.images.labels.cpu().numpy().tobytes())
        digests = [one.digest() for one in self.surrogates]
        structures = [one.structure() for one in self.surrogates]
        facts = {
            "weights": self.model.digest(),
            "network": self.model.structure(),
            "weights to transfer from": digests if len(digests) > 1 else next(iter(digests), None),
            "network to transfer from": structures if len(structures) > 1 else next(iter(structures), None),
            "images": pixels.hexdigest(),
            "protocol": self.protocol.as_json(),
            "settings": self.settings,
            "versions": {"afd": __version__, "torch": torch.__version__},
        }
        plain: dict[str, Any] = json.loads(json.dumps(facts))  # as it is read back
        return plain

    def runner(self, store: Store, meter: Meter) -> Runner:
        """What runs it."""
        return Runner(
            model=local(self.model.network), surrogates=[local(one.network) for one in self.surrogates],
            images=self.images, classes=self.classes, protocol=self.protocol, store=store, group=self.group,
            seed=self.seed, batch_size=self.batch_size, meter=meter, count=domain_counter(self.model, self.protocol),
            precision=self.precision,
        )  # fmt: skip

    def run(self, runner: Runner, *, split: str, featured: bool, **settings: Any) -> dict[str, Any] | None:
        """The content of results.json, on the leading process; None on the others.

        Args:
            runner: its own.
            split: which part of the data the images are.
            featured: whether the model has features to speak of.
            settings: more to name in the result.

        Raises:
            AttackFailedError: an attack raised; what was computed is in the store.
        """
        outcome = runner.run()
        confirmation = confirm(runner, outcome)
        second_look = verify(runner)
        if not self.group.leads:
            return None
        checks = [finite_check(outcome), *self.looked, *outcome_checks(outcome, self.classes)]
        checks.append(verification_check(second_look))
        checks += [] if self.precision == "fp32" else [precision_check(confirmation)]
        return summarize(
            outcome, model=self.model, surrogates=self.surrogates, images=self.images, split=split,
            checks=[check.as_json() for check in checks], verdict=overall(checks),
            features=feature_summary(self.model.network, self.images, self.batch_size) if featured else None,
            divergence=divergences(outcome), precision=self._precision(confirmation),
            settings={**self.settings, "processes": self.group.size, **settings},
        )  # fmt: skip

    def _precision(self, found: Confirmation | None) -> dict[str, Any]:
        ran = "fp32" if found is None else "bf16"
        return {"asked": self.precision, "attacks": ran, "confirmed": None if found is None else found.as_json()}


def prepare(
    model: Model,
    images: Images,
    protocol: Protocol,
    *,
    surrogates: Sequence[Model] = (),
    seed: int = 0,
    batch_size: int = 250,
    precision: str = "fp32",
    group: Group | None = None,
) -> Evaluation:
    """An evaluation, once nothing is found to be wrong with it; the arguments are those of `Evaluation`.

    Raises:
        InputError, InputTypeError, UnusableModelError, ExtraMissingError: as `evaluate_to_folder` says.
    """
    check_numbers(seed, batch_size)
    one_of("precision", precision, PRECISIONS)
    if len(images) == 0:
        raise InputError("images is empty; an evaluation needs at least one image")
    if not surrogates and any(stage.role == "transfer" for stage in protocol.stages):
        raise InputError("surrogate is None; this protocol transfers attacks and needs a second model")
    group = group or Group(device=images.device)
    images = images.to(group.device)
    protocol.check_stages()
    protocol.check_extras()
    protocol.check_radii(math.prod(images.shape))
    # alone, in a batch, in the last one, in the second look, among the probed: as the model will be asked later
    sizes = (1, batch_size, len(images) % batch_size or 1, other_batch_size(batch_size), PROBED)
    check_metadata(model)
    classes = check_fit(model, images, sizes)
    protocol = protocol.for_classes(classes)
    for surrogate in surrogates:
        check_metadata(surrogate)
        check_fit(surrogate, images, sizes)
        if surrogate.digest() == model.digest():
            raise InputError(f"{surrogate.source} holds the model's own weights; name another model to transfer from")
    probed = torch.arange(min(PROBED, len(images)), device="cpu")
    looked = model_checks(model, images.images(probed), images.labels[probed.to(group.device)])
    return Evaluation(
        model, tuple(surrogates), images, protocol, classes, tuple(looked), seed, batch_size, precision, group
    )


def check_numbers(seed: int, batch_size: int) -> None:
    """Raises InputError, InputTypeError unless an evaluation can use them."""
    for name, value, least in (("batch-size", batch_size, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputTypeError(f"{name} is {value!r}; it must be a whole number")
        if not least <= value < 2**62:
            raise InputError(f"{name} is {value}; it must be in [{least}, 2**62)")


# --- One call -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Result:
    """What `evaluate` measured; ``print(result)`` shows its table. Shares are in [0, 1].

    Attributes:
        content: all of it in plain types, as `afd evaluate` writes it into results.json.
        adversarial: images like x [N, ...]: where `broken`, the one that fooled the model; else the clean one.
        broken: whether the model is wrong on the clean image, or on one that was found in its ball, bool [N].
    """

    content: dict[str, Any]
    adversarial: Tensor
    broken: Tensor

    @property
    def accuracy(self) -> float:
        """On clean images."""
        return float(self.content["clean"])

    @property
    def robust_accuracy(self) -> float:
        """On images of which nothing that was tried has found an adversarial one."""
        (found,) = self._worst(self.content["worst_case"])
        return float(found)

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """Where the accuracy lies with 95% confidence, these images being a sample (Wilson 1927)."""
        low, high = self.content["intervals"]["clean"]
        return low, high

    @property
    def robust_accuracy_interval(self) -> tuple[float, float]:
        """The same of `robust_accuracy`."""
        low, high = self._worst(self.content["intervals"]["worst_case"])[0]
        return low, high

    def _worst(self, by_norm: dict[str, Any]) -> list[Any]:
        return list(by_norm[self.content["protocol"]["norm"]].values())

    @property
    def left(self) -> dict[str, float]:
        """Accuracy under each attack that counts; in AutoAttack, under it and all before it."""
        return {name: share for name, share, _ in self._attacks()}

    def _attacks(self) -> list[tuple[str, float, tuple[float, float]]]:
        """Name, accuracy and its interval of each attack that counts."""
        counted = [one for one in self.content["attacks"] if one["role"] != "probe"]
        return [(one["name"], one["accuracies"][0]["accuracy"], one["accuracies"][0]["interval"]) for one in counted]

    @property
    def checks(self) -> dict[str, Check]:
        """The checks for self-deception, by name."""
        return {one["name"]: Check(**one) for one in self.content["checks"]}

    @property
    def verdict(self) -> str:
        """The worst of the checks' verdicts: with "fail" the figures are no evidence of robustness."""
        return str(self.content["verdict"])

    def as_json(self) -> dict[str, Any]:
        """`content`, as json.dumps takes it."""
        return self.content

    def __repr__(self) -> str:
        return f"Result(accuracy {self.accuracy:.2%}, robust {self.robust_accuracy:.2%}, verdict {self.verdict!r})"

    def __str__(self) -> str:
        protocol, data = self.content["protocol"], self.content["data"]
        title = (
            f"{self.content['subject']['name']} on {data['count']} images, protocol {protocol['name']}, "
            f"{NORMS[protocol['norm']].sign}, ε = {protocol['reference']['text']}"
        )
        signs = [
            (one["name"], one["verdict"], "-" if one["number"] is None else f"{one['number']:.4g} {one['unit']}")
            for one in self.content["checks"]
        ]
        bad = [f"{name}: {check.meaning}" for name, check in self.checks.items() if check.verdict in ("warn", "fail")]
        shares = [
            ("none", self.accuracy, self.accuracy_interval), *self._attacks(),
            ("worst case", self.robust_accuracy, self.robust_accuracy_interval),
        ]  # fmt: skip
        rows = [(name, f"{100 * share:.2f}", spanned(span)) for name, share, span in shares]
        parts = [
            title, *protocol.get("notes", ()), *_aligned(("attack", "accuracy (%)", "95% interval"), rows),
            *confirmed_in_words(self.content), "", *_aligned(("check", "verdict", "number"), signs), "",
            VERDICTS[self.content["verdict"]], *bad,
        ]  # fmt: skip
        return "\n".join(parts)


def _aligned(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, tuple("-" * width for width in widths), *rows]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


@ordinary_modes()
def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | str,
    *,
    norm: Norm = "Linf",
    protocol: Literal["autoattack", "quick"] = "autoattack",
    precision: Literal["fp32", "auto"] = "fp32",
    surrogates: Sequence[nn.Module] = (),
    seed: int = 0,
    batch_size: int = 250,
    device: torch.device | str | None = None,
) -> Result:
    """How robust a classifier is on images, with every check for self-deception; nothing is written anywhere.

    `print(result)` shows accuracy, what each attack leaves, the worst case, 95% intervals and the checks. It needs
    torch and NumPy alone.

    Args:
        model: images [N, ...] in [0, 1] -> logits [N, classes], in any form of `afd.nn.outputs`; attacked in evaluation
            mode, and left as it was found.
        x: images [N, ...], float32 or float64 in [0, 1].
        y: labels [N] int64.
        eps: radius of the ball, > 0, in units of the image: a number, or a fraction such as "8/255".
        norm: "Linf", "L2" or "L1".
        protocol: "autoattack" (the standard version) or "quick" (PGD-20 and APGD-CE).
        precision: "fp32", or "auto": attacks run in bfloat16 where the device multiplies it in hardware; see
            `afd.evaluation.confirm` for what float32 looks at then.
        surrogates: other models of the same classes, on the same device: images made on any of them (by PGD) on which
            this one is wrong count as broken.
        seed: of all attacks.
        batch_size: images that are attacked together.
        device: where to; the models must be there. None for where x is.

    Raises:
        InputError, InputTypeError: an argument is not as described, or two are on different devices.
        UnusableModelError: a model does not take the images, or returns no logits [N, classes >= 2].
        AttackFailedError, ModelError: an attack raised; the model returned NaN, or cannot be differentiated.
    """
    one_of("protocol", protocol, NAMED)
    one_of("norm", norm, NORMS)
    if isinstance(eps, Tensor):
        raise InputTypeError("eps is a Tensor; evaluate takes one radius for all images, a number or such as '8/255'")
    radius, images = Epsilon.of(eps), _given(x, y, device)
    if not radius.exact:
        raise InputError("eps is 0, where nothing is attacked; it needs a radius > 0")
    if isinstance(surrogates, nn.Module) or not isinstance(surrogates, Sequence):
        raise InputTypeError(f"surrogates is a {type(surrogates).__name__}; it must be a list of models")
    subject = _model("model", model, images.device)
    others = [_model(f"surrogates[{number}]", one, images.device) for number, one in enumerate(surrogates)]
    images = replace(images, num_classes=check_fit(subject, images))
    highest = int(images.labels.max())
    if highest >= images.num_classes:
        raise InputError(f"y holds the label {highest}; the model has classes 0 ... {images.num_classes - 1}")
    plan = NAMED[protocol](norm, (radius,), radius)
    transfers = [
        Stage(f"transfer-{number + 1}", "pgd", norm, (radius,), {"steps": TRANSFER_STEPS}, "correct", "transfer",
              surrogate=number)
        for number in range(len(others))
    ]  # fmt: skip
    ready = prepare(
        subject, images, replace(plan, stages=(*plan.stages, *transfers)), surrogates=others, seed=seed,
        batch_size=batch_size, precision=precision,
    )  # fmt: skip
    runner = ready.runner(MemoryStore(), Silent())
    content = ready.run(runner, split="given", featured=False)
    assert content is not None
    return Result(content, *_adversarial(runner))


NAMED = {"autoattack": autoattack, "quick": quick}


def _given(x: Tensor, y: Tensor, device: torch.device | str | None) -> Given:
    """Images and labels, checked, on a device."""
    check_form(x, y)
    if not len(x):
        raise InputError("x holds no images; an evaluation needs at least one")
    largest_label(x, y, BOUNDS)
    where = x.device if device is None else device_named(str(device))
    return Given(x.to(where), y.to(where), 1.0, 0, "x")


def _model(name: str, network: nn.Module, device: torch.device) -> Model:
    """A model as an argument of that name, once it is found on the device."""
    if not isinstance(network, nn.Module):
        raise InputTypeError(f"{name} is a {type(network).__name__}; it must be a torch.nn.Module")
    elsewhere = {str(one.device) for one in (*network.parameters(), *network.buffers())} - {str(device)}
    if elsewhere:
        raise InputError(f"{name} is on {', '.join(sorted(elsewhere))}; it must be on the images' device, {device}")
    training = sum(bool(getattr(module, "training", False)) for module in network.modules())
    return Model(type(local(network)).__name__, name, network, training_modules=training)


def _adversarial(runner: Runner) -> tuple[Tensor, Tensor]:
    """Each image as what fooled the model left it, if anything that counts did; and where the model is wrong."""
    images = runner.images
    found = images.images()
    broken = torch.cat([~runner.batch(number).correct for number in runner.batches()])
    for number, item, result in runner.saved():
        rows = (result.rows + number * runner.batch_size).to(images.device)
        new = ~broken[rows]
        if item.stage.role != "probe":
            found[rows[new]], broken[rows[new]] = result.images.to(found)[new], True
    return found, broken
