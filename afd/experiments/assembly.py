"""A run's parts, made as its config says: data, network, trainer, batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from afd import methods
from afd.attacks import PGDSettings
from afd.checkpoint import CheckpointError
from afd.config import DataConfig, TrainConfig
from afd.data import NAMES, Batches, Images, MixedBatches, Splits, load, read_extra
from afd.data.files import FileSettings, load_files
from afd.data.images import CropAndFlip
from afd.data.sizing import SMALL, resolutions_of
from afd.data.sources import SHOWN
from afd.data.stored import StoredImages
from afd.data.streaming import ResizedCropAndFlip, StreamedBatches
from afd.errors import AfdError, InputError, in_a_line
from afd.execution import untouched
from afd.methods.ramps import ramps_of
from afd.nn import FeatureClassifier, FeatureSplit, build_named, freeze
from afd.nn.modes import evaluating
from afd.nn.normalized import stats_in
from afd.nn.sources import UnusableModelError, told
from afd.runtime import Group
from afd.training.mixing import Mixing
from afd.training.rebuilt import held_in
from afd.training.schedules import SCHEDULES, Schedule, step
from afd.training.trainer import Trainer
from afd.training.weight_files import OtherHeadError, published
from afd.training.weights import load_plainly, load_state

EVAL_BATCH = 500
CROP_SCALE = 0.25  # light augmentation, as adversarial training from scratch wants it


def splits_for(config: TrainConfig) -> Splits[Any]:
    """The data of a settled config: training, validation and test images, no more of each than its limit.

    Raises:
        DataError: files are missing or damaged.
    """
    asked = config.data
    if asked.name in NAMES:
        return load(asked.name, asked.root, validation=asked.validation).limited(asked.limit)
    return load_files(asked.name, file_settings(asked)).limited(asked.limit)


def facts_of(splits: Splits[Any]) -> dict[str, Any]:
    """What checkpoints keep of images in files: names of classes, and what test images are drawn of, where they are."""
    test = splits.test
    if not isinstance(test, StoredImages):
        return {}
    return {"classes": list(test.classes), **({"files": test.source.digest} if test.held_out else {})}


def damaged_in(splits: Splits[Any], group: Group, *served: Batches) -> tuple[str, ...]:
    """Files that hold no whole image and were left out, before the run or when any process has decoded them in it."""
    parts = (splits.train, splits.validation, splits.test)
    found = [name for part in parts if isinstance(part, StoredImages) for name in part.left_out]
    for batches in served:
        if isinstance(batches, StreamedBatches):
            images, damaged = batches.images, dict[int, str]()
            for others in group.gather(batches.damaged):
                damaged |= others
            found += [f"{images.told(place)}: {reason}" for place, reason in sorted(damaged.items())]
    return tuple(dict.fromkeys(found))


def damaged_lines(damaged: Sequence[str]) -> list[str]:
    """What is printed of them."""
    if not damaged:
        return []
    more = f" and {len(damaged) - SHOWN} more (result.json)" if len(damaged) > SHOWN else ""
    return [f"left out, as they hold no whole image: {len(damaged)} files: {'; '.join(damaged[:SHOWN])}{more}"]


def file_settings(asked: DataConfig) -> FileSettings:
    """How images in files are split, sized and read."""
    return FileSettings(
        validation=asked.validation, test_share=asked.test_share, image_size=asked.image_size, resize=asked.resize,
        bad=asked.bad_images, workers=asked.workers,
    )  # fmt: skip


def begin_with(model: FeatureClassifier | FeatureSplit, path: Path, new_head: int | None = None) -> None:
    """Loads the weights of a checkpoint (the average, where there is one) or of a file that holds a state_dict.

    Args:
        model: that takes them; whether it scales features stays as it is.
        path: the file.
        new_head: has the model keep its own last linear layer, where it is the number of its classes; else None.

    Raises:
        CheckpointError: it cannot be read, or does not fit the model.
        InputError: it is of a published network, which scales no features, and the model does.
    """
    held, fresh = held_in(path), new_head is not None
    source = f"weights {held.path}"
    try:
        if isinstance(model, FeatureSplit):
            load_plainly(held.weights, model, source, held.facts, fresh_head=fresh)
            return
        normalize = model.normalize
        renamed = held.state is None and published(held.weights, model, source) is not None
        load_state(held.weights, held.facts, model, source, fresh_head=fresh)
    except OtherHeadError as error:
        raise CheckpointError(f"{error}; --new-head {model.num_classes} gives it a fresh one") from error
    if renamed and normalize:
        raise InputError(
            f"weights is {path}, of a network that gives its features to the last layer as they are; go on with "
            "--no-normalize, as scaled to length 1 they are another function's"
        )
    model.normalize = normalize


def trainer_for(
    config: TrainConfig, model: FeatureClassifier | FeatureSplit, facts: Mapping[str, Any] = MappingProxyType({})
) -> Trainer:
    """The trainer that a settled config describes, without callbacks; its checkpoints keep `facts` of the data, too."""
    kept = config.as_json()
    kept["data"].pop("workers", None)  # which have no say in what a run comes to
    kept["data"] |= facts
    assert config.method is not None
    assert config.epochs is not None
    return Trainer(
        model,
        config.method,
        epochs=config.epochs,
        schedule=schedule_for(config),
        eps_warmup=config.eps_warmup,
        lr_warmup=config.lr_warmup,
        ramps=ramps_of(config.ramps),
        ema=config.ema,
        ema_warmup=config.ema_warmup,
        ema_buffers=config.ema_buffers,
        mixing=Mixing(config.mixup, config.cutmix),
        execution=methods.Execution(
            config.precision,
            compile=config.compile,
            sync_batchnorm=config.sync_batchnorm,
            graph=config.graph,
            checkpoint_activations=config.checkpoint_activations,
        ),
        seed=config.seed,
        log_every=config.log_every,
        folder=config.out,
        overwrite=config.overwrite,
        save_every=config.save_every,
        resume=config.resume,
        config=kept,
        on_alarm=config.on_alarm,
    )


def schedule_for(config: TrainConfig) -> Schedule:
    """The schedule of the learning rates."""
    return step(config.milestones) if config.lr_schedule == "step" else SCHEDULES[config.lr_schedule]


def model_for(config: TrainConfig, images: Images | StoredImages) -> FeatureClassifier | FeatureSplit:
    """A fresh model of the config's kind that fits the images, with the weights that it begins with.

    Raises:
        ExtraMissingError: it is of a library that is not installed.
        UnusableModelError: there is no such model, or it does not take such images.
        InputError: it has another number of classes than the data, or not what a setting asks for.
        CheckpointError: the weights do not fit.
    """
    chosen = config.model
    assert chosen.name is not None
    assert chosen.width is not None
    channels, height, width = images.shape
    stats = None if chosen.input_stats is None else stats_in(chosen.input_stats, channels)
    model = build_named(
        chosen.name, (channels, height, width), images.num_classes, width=chosen.width, activation=chosen.activation,
        normalize=chosen.normalize, input_stats=stats, new_head=chosen.new_head, drop_path=chosen.drop_path,
    )  # fmt: skip
    if config.weights is not None:
        begin_with(model, config.weights, chosen.new_head)
    if isinstance(model, FeatureSplit):
        _check_fit(chosen.name, model, images)
    freeze(model.model if isinstance(model, FeatureSplit) else model, chosen.freeze)
    return model


def _check_fit(name: str, model: FeatureSplit, images: Images | StoredImages) -> None:
    """Tries somebody else's model on two grey images of the data's shape before anything is trained."""
    size = "x".join(map(str, images.shape))
    try:
        grey = torch.full((2, *images.shape), 0.5)
        with evaluating(model):
            model.settle(grey)
        with untouched(model), torch.no_grad():  # some go another way in training
            model.train()
            model(grey)
    except AfdError as error:
        how = " of afd.nn.split, in a function package.module:function" if "as feature_layer" in str(error) else ""
        told_so = f"model {name} is of no use for {images.name}'s {size} images: {error}{how}"
        raise UnusableModelError(told_so) from error
    except Exception as error:  # the model's own: whatever it raises is told, with its traceback
        raise UnusableModelError(f"model {name} does not take {images.name}'s {size} images: {told(error)}") from error
    if model.num_classes != images.num_classes:
        raise InputError(
            f"model {name} has {model.num_classes} classes, and {images.name} has {images.num_classes}; "
            f"--new-head {images.num_classes} gives it a fresh last layer"
        )


def train_batches(
    config: TrainConfig,
    images: Images | StoredImages,
    device: torch.device,
    group: Group = Group(),
) -> Batches:
    """Shuffled (and augmented) training batches, extra images among them, this process's rows of them."""
    asked, size = config.data, config.data.batch_size
    settings: dict[str, Any] = {
        "seed": config.seed,
        "augment": augmentation(asked, images.shape) if asked.augment else None,
        "device": device,
        "rank": group.rank,
        "world_size": group.size,
        "channels_last": True,
    }
    if isinstance(images, StoredImages):
        resolutions = resolutions_of(asked.resolutions)
        return StreamedBatches(images, size, shuffle=True, resolutions=resolutions, **settings)
    if asked.extra_data is None and asked.epoch_images is None:
        return Batches(images, size, shuffle=True, **settings)
    extra = None if asked.extra_data is None else read_extra(asked.extra_data, images)
    share = asked.extra_share or 0.0
    return MixedBatches(images, size, extra=extra, share=share, epoch_images=asked.epoch_images, **settings)


def check_resolutions(model: nn.Module, batches: Batches) -> None:
    """Raises InputError if a network does not take images of one of the sides that they grow through."""
    if not isinstance(batches, StreamedBatches):
        return
    device = next(model.parameters()).device
    for side in dict.fromkeys(one.side for one in batches.resolutions):
        try:
            with evaluating(model), torch.no_grad():
                model(torch.zeros(2, 3, side, side, device=device))
        except Exception as error:  # the model's own
            raise InputError(f"resolutions has {side}, which the network does not take: {in_a_line(error)}") from error


def augmentation(asked: DataConfig, shape: tuple[int, int, int]) -> CropAndFlip | ResizedCropAndFlip:
    """What training images of a shape go through: padded crops where they are small, parts of them beyond."""
    if asked.crop_scale is None and max(shape[1:]) <= SMALL:
        return CropAndFlip()
    return ResizedCropAndFlip(shape[1:], CROP_SCALE if asked.crop_scale is None else asked.crop_scale)


def plain(images: Images | StoredImages, device: torch.device) -> Batches:
    """Batches to measure accuracy on."""
    if isinstance(images, StoredImages):
        return StreamedBatches(images, EVAL_BATCH, device=device)
    return Batches(images, EVAL_BATCH, device=device)


def test_attack(config: TrainConfig, steps: int) -> PGDSettings:
    """PGD in the ball of a settled config, as used in validation and test: random start, step 2.5 eps / steps."""
    return config.test.pgd(steps, config.seed)
