"""A run's parts, made as its config says: data, network, trainer, batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from afd import methods
from afd.attacks import PGDSettings
from afd.config import TrainConfig
from afd.data import Batches, Images, MixedBatches, Splits, load, read_extra
from afd.data.images import CropAndFlip
from afd.errors import InputError
from afd.methods.ramps import ramps_of
from afd.nn import FeatureClassifier, build_model
from afd.runtime import Group
from afd.training.mixing import Mixing
from afd.training.schedules import SCHEDULES, Schedule, step
from afd.training.trainer import Trainer
from afd.training.weights import rebuild

EVAL_BATCH = 500


def splits_for(config: TrainConfig) -> Splits:
    """The data of a settled config: training, validation and test images, no more of each than its limit.

    Raises:
        DataError: files are missing or damaged.
    """
    asked = config.data
    return load(asked.name, asked.root, validation=asked.validation).limited(asked.limit)


def begin_with(model: FeatureClassifier, path: Path) -> None:
    """Loads the weights of a checkpoint (the average, where there is one) or of a file that holds a state_dict.

    Raises:
        CheckpointError: it cannot be read, or does not fit the model.
        InputError: it is of a published network, which scales no features, and the model does.
    """
    normalize = model.normalize
    if rebuild(path, model=model).published and normalize:
        raise InputError(
            f"weights is {path}, of a network that gives its features to the last layer as they are; go on with "
            "--no-normalize, as scaled to length 1 they are another function's"
        )
    model.normalize = normalize


def trainer_for(config: TrainConfig, model: FeatureClassifier) -> Trainer:
    """The trainer that a settled config describes, without callbacks."""
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
            config.precision, compile=config.compile, sync_batchnorm=config.sync_batchnorm, graph=config.graph
        ),
        seed=config.seed,
        log_every=config.log_every,
        folder=config.out,
        overwrite=config.overwrite,
        save_every=config.save_every,
        resume=config.resume,
        config=config.as_json(),
        on_alarm=config.on_alarm,
    )


def schedule_for(config: TrainConfig) -> Schedule:
    """The schedule of the learning rates."""
    return step(config.milestones) if config.lr_schedule == "step" else SCHEDULES[config.lr_schedule]


def model_for(config: TrainConfig, images: Images) -> FeatureClassifier:
    """A fresh model of the config's kind that fits the images."""
    chosen = config.model
    assert chosen.name is not None
    assert chosen.width is not None
    channels, height, width = images.pixels.shape[1:]
    shape = channels, height, width
    model = build_model(chosen.name, shape, images.num_classes, chosen.width, chosen.activation)
    model.normalize = config.model.normalize
    return model


def train_batches(
    config: TrainConfig,
    images: Images,
    device: torch.device,
    group: Group = Group(),
) -> Batches:
    """Shuffled (and augmented) training batches, extra images among them, this process's rows of them."""
    asked, size = config.data, config.data.batch_size
    settings: dict[str, Any] = {
        "seed": config.seed,
        "augment": CropAndFlip() if asked.augment else None,
        "device": device,
        "rank": group.rank,
        "world_size": group.size,
        "channels_last": True,
    }
    if asked.extra_data is None and asked.epoch_images is None:
        return Batches(images, size, shuffle=True, **settings)
    extra = None if asked.extra_data is None else read_extra(asked.extra_data, images)
    share = asked.extra_share or 0.0
    return MixedBatches(images, size, extra=extra, share=share, epoch_images=asked.epoch_images, **settings)


def plain(images: Images, device: torch.device) -> Batches:
    """Batches to measure accuracy on."""
    return Batches(images, EVAL_BATCH, device=device)


def test_attack(config: TrainConfig, steps: int) -> PGDSettings:
    """PGD in the ball of a settled config, as used in validation and test: random start, step 2.5 eps / steps."""
    return config.test.pgd(steps, config.seed)
