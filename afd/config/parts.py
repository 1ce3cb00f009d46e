"""What a training run is made of, part by part, as frozen dataclasses: data, network, test, and how it goes.

Fields that are None take the data set's value from `PRESETS`; `TrainConfig.settled` fills them in. Attribute docstrings
are the CLI's help lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from afd.attacks import Norm, PGDSettings, UnionSettings
from afd.installation import needed_by
from afd.nn.encoders import Activation

with needed_by("afd.config"):
    from tyro.conf import arg

Number = float  # which the command line also takes as a fraction


@dataclass(frozen=True)
class DataConfig:
    """Which images, from where, and how they are served."""

    name: Annotated[str, arg(name="data")] = "digits"
    """Data set: digits (ships with scikit-learn), mnist, cifar10, cifar100 (files); folder:PATH, class folders of JPEG,
    PNG or WebP files; shards:PATTERN, tar files of them, such as shards:/data/train-{000..127}.tar."""
    root: Annotated[Path | None, arg(name="data-root")] = None
    """Folder of the data files; by default a cache folder, filled from the network."""
    validation: Number = 0.1
    """Share of the training images kept apart to choose the best checkpoint."""
    test_share: Number | None = None
    """Share of a folder's or shards' images kept apart as test images, where none are there. Default: 0.2."""
    image_size: int | None = None
    """Side of the square that networks see of a file's image. Default: images as they are, all of one size."""
    resize: int | None = None
    """Shorter side that a file's image is brought to before the square is cut. Default: the image size up to 64 pixels,
    8/7 of it beyond."""
    resolutions: tuple[str, ...] = ()
    """Sides of training images over the run, as SIDE:EPOCH from which on, such as 128:1 224:7 288:13."""
    crop_scale: Number | None = None
    """Training crops take at least this share of an image and are brought to its size. Default: 0.25 beyond 64 pixels;
    up to there, crops are of one size, from an image padded by 4."""
    workers: int | None = None
    """Processes that read and decode files. Default: one less than there are cores, 8 at most."""
    bad_images: Literal["error", "skip"] = "error"
    """What is done about files that hold no whole image: error, or skip, with their number and names in the report."""
    limit: int | None = None
    """Use at most so many images of each part (training, validation, test), drawn class by class. Default: all."""
    batch_size: int = 128
    """Images a batch."""
    augment: bool | None = None
    """Random crop (see --crop-scale) and horizontal flip. Default: for CIFAR and for images in files."""
    extra_data: Path | None = None
    """More images to train on: an .npz file, or a folder with a folder of PNG or JPEG files for each class."""
    extra_share: Number | None = None
    """Share of each batch that is images of --extra-data. Default: 0.7 (Wang et al. 2023, with 1M generated ones)."""
    epoch_images: int | None = None
    """Images of an epoch, extra ones included. Default: the number of training images, without extra ones."""


@dataclass(frozen=True)
class ModelConfig:
    """Which network."""

    name: Annotated[str | None, arg(name="model")] = None
    """Network: convnet, resnet18, resnet50, preactresnet18, wideresnet28-10, wideresnet34-10, vgg11-bn to vgg19-bn;
    timm:NAME, torchvision:NAME, hf:NAME or a folder with its config.json; package.module:function, which returns one.
    Default: convnet for digits and MNIST, resnet50 for files of more than 64 pixels, else resnet18."""
    width: int | None = None
    """Filters of the first layer. Default for convnet and resnet18: 32 for digits, 16 for MNIST (as in the paper), 64
    for CIFAR; for others their paper's, 16 for WideResNets (whose factor comes on top), else 64."""
    activation: Activation = "relu"
    """Nonlinearity of the network; softplus has beta 1."""
    normalize: bool = True
    """Scale features to length 1 before classifier and discriminator see them; in a network that is not afd's own,
    before the discriminator alone, so that it stays the function that it is."""
    input_stats: str | None = None
    """Mean and deviation that a network's images are normalised by, inside of it: imagenet, or MEAN,STD for all
    channels, or of each channel all means, then all deviations. Default: none; eps stays in [0, 1]."""
    new_head: int | None = None
    """Give the network a fresh last layer of so many classes, once it has its weights."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are, by patterns of their names, such as 'layer1.*' 'stem*'."""
    drop_path: Number = 0.0
    """Stochastic depth of a timm or torchvision network: share of residual branches left out in training passes (in
    attacks, none is)."""


@dataclass(frozen=True)
class TestConfig:
    """The ball in which PGD tests the trained network: that of the method's attack, where it has one."""

    norm: Norm = "Linf"
    """Norm of the ball."""
    eps: Number | None = None
    """Radius of the ball. Default: 0.2 digits, 0.3 MNIST, 8/255 CIFAR; in L2 0.75, 2 and 0.5; in L1 2, 10 and 12.
    Images in files: as CIFAR up to an --image-size of 64, beyond it 4/255, 2 and 255."""
    union: str | None = None
    """Balls in whose union it is tested instead, such as Linf=8/255,L2=0.5,L1=12."""

    def pgd(self, steps: int, seed: int) -> PGDSettings:
        """The test itself; in a union an image counts as robust if it withstands the attack in every ball."""
        if self.union is not None:
            return UnionSettings.written(self.union).pgd(steps, seed)
        assert self.eps is not None
        return PGDSettings(norm=self.norm, eps=self.eps, steps=steps, seed=seed)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How a run goes, whatever is trained."""

    epochs: int | None = None
    """Passes over the training images. Default: 60 digits, 10 MNIST, 300 CIFAR, 100 files; divided by a method's
    repeats."""
    lr_schedule: Literal["step", "cosine", "one-cycle"] = "step"
    """How all learning rates change over the run."""
    milestones: tuple[Number, ...] = (0.5, 5 / 6)
    """step: shares of the epochs after which the rates fall to a tenth (the paper's CIFAR: 150 and 250 of 300)."""
    lr_warmup: Number = 0.0
    """Epochs in which all learning rates grow linearly to what the schedule says."""
    eps_warmup: Number = 0.0
    """Epochs in which the training attack grows to its full radius."""
    ramps: tuple[str, ...] = ()
    """Numbers that go linearly to their own value, as NAME=FIRST:EPOCHS: beta=0:5 attack.eps=0:10 attack.steps=2:20."""
    ema: Number | None = None
    """Decay a step of an exponential average of the weights, which is then validated and tested. Default: none."""
    ema_warmup: bool = True
    """Let the decay grow to --ema: min(ema, (1 + t) / (10 + t)) after t steps."""
    ema_buffers: Literal["averaged", "copied", "recomputed"] = "averaged"
    """BatchNorm statistics of the average: averaged like its weights, copied from the model, or recomputed over the
    training images before each validation."""
    mixup: Number = 0.0
    """Mixup of training images and labels: the alpha of its Beta distribution; 0 for none. With --cutmix, either at
    half the time."""
    cutmix: Number = 0.0
    """CutMix of training images and labels: the alpha of its Beta distribution, usually 1; 0 for none."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Arithmetic of the network in attack and training; auto: bf16 where the device multiplies it in hardware."""
    checkpoint_activations: bool = False
    """Keep the activations of a training pass between blocks only, and compute the others anew in its backward."""
    compile: bool = False
    """Run the training passes through torch.compile."""
    sync_batchnorm: bool = False
    """BatchNorm statistics over the batches of all processes (CUDA only)."""
    graph: bool = False
    """Capture the whole step, attack and optimizer steps included, in one CUDA graph and replay it. What a model's code
    reads outside of its tensors and attributes (a closure, a global, Python's random numbers) stays as captured."""
    seed: int = 0
    """Of initial weights, batch order, augmentation and attack starts."""
    seeds: tuple[int, ...] = ()
    """Several, as 0,1,2: a run for each of them, in --out's seed-0 and so on, and a table of all."""
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
    """Steps between checkpoints within an epoch; there is always one at its end."""
    log_every: int = 50
    """Steps between lines of the log."""
    on_alarm: Literal["warn", "stop", "rollback", "off"] = "warn"
    """What is done where training goes wrong: collapses, hides its gradients, stays at chance, or has gradients that
    explode. stop: after that epoch, with exit status 3; rollback: to the last good epoch, and on with a stronger attack
    or a smaller rate; off: nobody looks."""
