"""What a training run is made of, as frozen dataclasses: the CLI reads them, a checkpoint keeps them.

Fields that are None take the data set's value from `PRESETS`; `TrainConfig.settled` fills them in. Attribute docstrings
are the CLI's help lines.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from afd.errors import InputError, at_least, count, in_levels
from afd.extras import needed_by
from afd.paths import check_path, check_target

with needed_by("afd.config"):
    from tyro.conf import arg

GREY = 0.5  # the Linf radius from which any image may become the same grey as any other
Number = float  # which the command line also takes as a fraction


@dataclass(frozen=True)
class DataConfig:
    """Which images, from where, and how they are served."""

    name: Annotated[Literal["digits", "mnist", "cifar10", "cifar100"], arg(name="data")] = "digits"
    """Data set; digits ships with scikit-learn, the others are files."""
    root: Annotated[Path | None, arg(name="data-root")] = None
    """Folder of the data files; by default a cache folder, filled from the network."""
    validation: Number = 0.1
    """Share of the training images kept apart to choose the best checkpoint."""
    limit: int | None = None
    """Use at most so many images of each part (training, validation, test), drawn class by class. Default: all."""
    batch_size: int = 128
    """Images a batch."""
    augment: bool | None = None
    """Random crop with padding 4 and horizontal flip. Default: for CIFAR only."""


@dataclass(frozen=True)
class ModelConfig:
    """Which network."""

    name: Annotated[Literal["convnet", "resnet18"] | None, arg(name="model")] = None
    """Network. Default: convnet for digits and MNIST, resnet18 for CIFAR."""
    width: int | None = None
    """Filters of the first layer. Default: 32 for digits, 16 for MNIST (as in the paper), 64 for CIFAR."""
    normalize: bool = True
    """Scale features to length 1 before classifier and discriminator see them."""


@dataclass(frozen=True)
class AttackConfig:
    """The Linf attack to train against; validation and test use PGD at the same radius."""

    name: Annotated[Literal["pgd", "apgd"], arg(name="attack")] = "pgd"
    """Training attack: projected gradient descent, or Auto-PGD as in the paper (it sets its own step sizes)."""
    eps: Number | None = None
    """Radius of the Linf ball. Default: 0.2 digits, 0.3 MNIST, 8/255 CIFAR."""
    steps: Annotated[int | None, arg(name="attack-steps")] = None
    """Steps of the training attack. Default: 10."""
    alpha: Number | None = None
    """Step size of PGD. Default: 2.5 eps / steps."""
    eval_steps: int = 20
    """Steps of the validation attack."""

    def step_size(self, steps: int) -> float:
        """The step size of an attack of `steps` steps."""
        assert self.eps is not None
        return self.alpha if self.alpha is not None else 2.5 * self.eps / max(steps, 1)


@dataclass(frozen=True)
class MethodConfig:
    """How the network is trained."""

    name: Annotated[Literal["natural", "afd"], arg(name="method")] = "afd"
    """natural: cross-entropy on clean images; afd: adversarial feature desensitization."""
    loss: Literal["dcgan", "wgan", "hinge"] = "wgan"
    """Loss of the game between discriminator and features."""
    schedule: Literal["simultaneous", "alternating"] = "simultaneous"
    """simultaneous: the paper's Algorithm 1; alternating: the authors' released code."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimizer of every player; adam: the released code's variant."""
    lr: Number | None = None
    """Learning rate of features and classifier (alpha). Default: 0.1 for sgd, 1e-4 for adam."""
    lr_discriminator: Number | None = None
    """Learning rate of the discriminator (beta). Default: 0.1 for sgd, 1e-3 for adam."""
    lr_features: Number | None = None
    """Learning rate of the features against the discriminator (gamma). Default: 0.5 for sgd, 1e-4 for adam."""
    momentum: Number = 0.9
    """Momentum of every SGD optimizer."""
    weight_decay: Number | None = None
    """Weight decay of features and classifier. Default: 1e-4 for sgd, 0 for adam."""
    label_smoothing: Number = 0.0
    """Share of the label that is spread over all classes."""
    clip: Number | None = None
    """Largest norm of each optimizer's gradient. Default: any."""
    micro_batches: int = 1
    """Parts of a batch that are passed one by one, to save memory."""
    discriminator_rounds: int = 1
    """The features answer the discriminator in every so many rounds."""
    penalty: Number = 0.0
    """Weight of the discriminator's gradient penalty."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run: data, network, attack, method, and where its results go."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    epochs: int | None = None
    """Passes over the training images. Default: 60 digits, 10 MNIST, 300 CIFAR."""
    lr_schedule: Literal["step", "cosine", "one-cycle"] = "step"
    """How all learning rates change over the run."""
    milestones: tuple[Number, ...] = (0.5, 5 / 6)
    """step: shares of the epochs after which the rates fall to a tenth (the paper's CIFAR: 150 and 250 of 300)."""
    eps_warmup: Number = 0.0
    """Epochs in which the training attack grows to its full radius."""
    ema: Number | None = None
    """Decay a round of an exponential average of the weights, which is then validated and tested. Default: none."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Arithmetic of the network in attack and training; auto: bf16 where the device multiplies it in hardware."""
    compile: bool = False
    """Run the training passes through torch.compile."""
    sync_batchnorm: bool = False
    """BatchNorm statistics over the batches of all processes (CUDA only)."""
    graph: bool = False
    """Record the whole round, attack and optimizer steps included, in one CUDA graph and replay it. What a model's code
    reads outside of its tensors and attributes (a closure, a global, Python's random numbers) stays as recorded."""
    seed: int = 0
    """Of initial weights, batch order, augmentation and attack starts."""
    device: str = "auto"
    """torch device; auto takes CUDA where there is one."""
    out: Path | None = None
    """Folder for checkpoints, weights and logs. Default: the next numbered one, runs/0001 and so on; runs/latest leads
    to the newest."""
    overwrite: bool = False
    """Discard the run that --out holds."""
    resume: str | None = None
    """Go on from a checkpoint: auto (the newest whole one in --out, by default in runs/latest, if there is one) or its
    file. --epochs may be more than before."""
    weights: Path | None = None
    """Begin with these weights: a checkpoint, or a file that holds a state_dict, such as a run's model.pt."""
    save_every: int = 0
    """Rounds between checkpoints within an epoch; there is always one at its end."""
    log_every: int = 50
    """Rounds between lines of the log."""

    def settled(self) -> TrainConfig:
        """The same run with every default of its data set written out.

        Raises:
            InputError: a number out of its range.
        """
        preset = PRESETS[self.data.name]
        config = dataclasses.replace(
            self,
            data=_filled(self.data, augment=preset.augment),
            model=_filled(self.model, name=preset.model, width=preset.width),
            attack=_filled(self.attack, eps=preset.eps, steps=10),
            method=_filled(self.method, **RATES[self.method.optimizer]),
            epochs=preset.epochs if self.epochs is None else self.epochs,
        )
        config._check()
        return config

    def _check(self) -> None:
        data, model, attack = self.data, self.model, self.attack
        if self.ema is not None and not 0 <= self.ema < 1:
            raise InputError(f"ema is {self.ema}; it must be in [0, 1)")
        self._check_paths()
        at_least("eps-warmup", self.eps_warmup, 0)
        count("save-every", self.save_every, 0)
        count("log-every", self.log_every, 1)
        assert model.width is not None
        assert attack.eps is not None
        assert attack.steps is not None
        assert self.epochs is not None
        count("batch-size", data.batch_size, 1)
        if data.limit is not None:
            count("limit", data.limit, 1)
        count("width", model.width, 1)
        at_least("eps", attack.eps, 0)
        count("attack-steps", attack.steps, 0)
        count("eval-steps", attack.eval_steps, 0)
        at_least("alpha", attack.step_size(attack.steps), 0)
        for name, length in (("eps", attack.eps), ("alpha", attack.alpha)):
            if length is not None and length > 1:
                raise InputError(f"{name} is {length:g}; images lie in [0, 1], so it is at most 1{in_levels(length)}")
        count("epochs", self.epochs, 1)
        at_least("seed", self.seed, 0)
        if self.overwrite and self.resume == "auto":
            raise InputError("resume is auto and overwrite is set; a run is gone on with or discarded, not both")
        if self.seed >= 2**62:
            raise InputError(f"seed is {self.seed}; it must be in [0, 2**62)")
        if not 0 < data.validation < 1:
            raise InputError(f"validation is {data.validation}; it must be a share between 0 and 1")
        if any(not 0 < share <= 1 for share in self.milestones):
            raise InputError(f"milestones are {self.milestones}; each must be a share of the epochs, in (0, 1]")

    def _check_paths(self) -> None:
        if self.out is not None:
            check_target("out", self.out)
        for name, path in (("weights", self.weights), ("resume", self.resume), ("data-root", self.data.root)):
            if path is not None:
                check_path(name, path)
        if self.overwrite and self.out is None:
            raise InputError("overwrite is set, but out is not; the numbered folders are never overwritten")

    def warnings(self) -> list[str]:
        """What is allowed, of a settled config, and yet hardly meant."""
        if self.method.name == "natural" or self.attack.eps is None or self.attack.eps < GREY:
            return []
        return [
            f"eps is {self.attack.eps:g}: from {GREY} on, any image may become the same grey as any other, and nothing "
            f"can be learnt{in_levels(self.attack.eps)}"
        ]

    def as_json(self) -> dict[str, Any]:
        """Plain types only, for a checkpoint's metadata."""
        plain = dataclasses.asdict(self)
        for name in ("out", "weights"):
            plain[name] = None if getattr(self, name) is None else str(getattr(self, name))
        plain["data"]["root"] = None if self.data.root is None else str(self.data.root)
        if self.data.limit is None:  # as in checkpoints of the time when there was none
            del plain["data"]["limit"]
        return plain


@dataclass(frozen=True)
class Preset:
    """What a data set asks for where the user says nothing."""

    model: str
    width: int
    eps: float
    epochs: int
    augment: bool


PRESETS = {
    "digits": Preset("convnet", width=32, eps=0.2, epochs=60, augment=False),
    "mnist": Preset("convnet", width=16, eps=0.3, epochs=10, augment=False),
    "cifar10": Preset("resnet18", width=64, eps=8 / 255, epochs=300, augment=True),
    "cifar100": Preset("resnet18", width=64, eps=8 / 255, epochs=300, augment=True),
}


# What an optimizer asks for where the user says nothing; those of adam are the released code's.
RATES: dict[str, dict[str, float]] = {
    "sgd": {"lr": 0.1, "lr_discriminator": 0.1, "lr_features": 0.5, "weight_decay": 1e-4},
    "adam": {"lr": 1e-4, "lr_discriminator": 1e-3, "lr_features": 1e-4, "weight_decay": 0.0},
}


_Config = TypeVar("_Config", DataConfig, ModelConfig, AttackConfig, MethodConfig)


def _filled(config: _Config, **defaults: Any) -> _Config:
    """`config` with `defaults` in the fields that are None."""
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)
