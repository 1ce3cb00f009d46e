"""A training run as a frozen dataclass of its parts: the CLI reads it, a checkpoint and ``run.toml`` keep it."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from afd.attacks import NORMS, AttackSettings, UnionSettings
from afd.attacks.union import words_of
from afd.config.parts import DataConfig, ModelConfig, RunConfig, TestConfig
from afd.data import NAMES, check_data
from afd.data.datasets import resolved
from afd.data.sizing import Sizing, resolutions_of
from afd.errors import InputError, at_least, count, fits, in_a_line, in_levels, in_words, without_fractions
from afd.files import check_path, check_target
from afd.installation import needed_by
from afd.methods import Method
from afd.methods.ramps import check_ramps, ramps_of
from afd.methods.registry import described, made
from afd.nn.networks import check_model
from afd.presets import PRESETS, kind_of, method_for, radius, width_for

with needed_by("afd.config"):
    import tomli_w

__all__ = ["DataConfig", "ModelConfig", "RunConfig", "TestConfig", "TrainConfig", "ball_of", "recipes"]

PATHS = ("out", "weights", "root", "extra_data")
PARTS = ("data", "model", "method", "test")
OUTCOME = ("out", "overwrite", "resume")
# settings that checkpoints of the time when there were none lack, and what that means: left out where they say no more
LATER = {
    "seeds": (), "ramps": (), "mixup": 0.0, "cutmix": 0.0, "on_alarm": "warn", "checkpoint_activations": False,
}  # fmt: skip
LATER_OF_MODEL = {"activation": "relu", "input_stats": None, "new_head": None, "freeze": (), "drop_path": 0.0}
LATER_OF_TEST = {"union": None}
LATER_OF_DATA = {
    "limit": None, "extra_data": None, "extra_share": None, "epoch_images": None, "test_share": None,
    "image_size": None, "resize": None, "resolutions": (), "crop_scale": None, "workers": None, "bad_images": "error",
}  # fmt: skip
OF_FILES = ("test_share", "image_size", "resize", "resolutions", "crop_scale", "workers", "bad_images")
RECIPES = Path(__file__).parents[1] / "recipes"
GREY = 0.5  # the Linf radius from which any image may become the same grey as any other
EXTRA_SHARE = 0.7


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """One training run: data, network, method with its attack, and where its results go."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: Method | None = None
    """Training method. Default: AFD against the attack that the data set asks for."""
    test: TestConfig = field(default_factory=TestConfig)

    def settled(self) -> TrainConfig:
        """The same run with every default of its data set written out.

        Raises:
            InputError: a number out of its range, or no radius for such a ball.
        """
        kind = kind_of(self.data.name, self.data.image_size)
        preset = PRESETS[kind]
        method = method_for(kind) if self.method is None else self.method
        test = ball_of(method) or self.test
        share = None if self.data.extra_data is None else EXTRA_SHARE
        if test.eps is None and test.union is None:
            test = dataclasses.replace(test, eps=radius(kind, test.norm))
        config = dataclasses.replace(
            self,
            data=dataclasses.replace(
                _filled(self.data, augment=preset.augment, extra_share=share), name=resolved(self.data.name)
            ),
            model=_filled(self.model, name=preset.model, width=width_for(kind, self.model.name)),
            method=method,
            test=test,
            # a batch that is repeated is passed so many times (Shafahi et al. 2019 divide likewise)
            epochs=math.ceil(preset.epochs / method.repeats) if self.epochs is None else self.epochs,
        )
        config._check()
        return config

    def _check(self) -> None:
        data, model = self.data, self.model
        assert model.name is not None
        check_model(model.name)
        if self.ema is not None and not 0 <= self.ema < 1:
            raise InputError(f"ema is {self.ema}; it must be in [0, 1)")
        self._check_paths()
        assert self.method is not None
        check_ramps(self.method, ramps_of(self.ramps), self.eps_warmup)
        at_least("lr-warmup", self.lr_warmup, 0)
        at_least("eps-warmup", self.eps_warmup, 0)
        at_least("mixup", self.mixup, 0)
        at_least("cutmix", self.cutmix, 0)
        count("save-every", self.save_every, 0)
        count("log-every", self.log_every, 1)
        assert model.width is not None
        assert self.epochs is not None
        count("batch-size", data.batch_size, 1)
        self._check_data()
        count("width", model.width, 1)
        _check_network(model)
        self._check_test()
        count("epochs", self.epochs, 1)
        if self.overwrite and self.resume == "auto":
            raise InputError("resume is auto and overwrite is set; a run is gone on with or discarded, not both")
        for name, seed in (("seed", self.seed), *(("one of the seeds", one) for one in self.seeds)):
            if not 0 <= seed < 2**62:
                raise InputError(f"{name} is {seed}; it must be in [0, 2**62)")
        self._check_seeds()
        if any(not 0 < share <= 1 for share in self.milestones):
            raise InputError(f"milestones are {self.milestones}; each must be a share of the epochs, in (0, 1]")

    def _check_data(self) -> None:
        data = self.data
        check_data(data.name)
        if data.limit is not None:
            count("limit", data.limit, 1)
        if not 0 < data.validation < 1:
            raise InputError(f"validation is {data.validation}; it must be a share between 0 and 1")
        if data.extra_share is not None and not 0 < data.extra_share < 1:
            raise InputError(f"extra-share is {data.extra_share}; it must be a share between 0 and 1")
        if data.extra_share is not None and data.extra_data is None:
            raise InputError(f"extra-share is {data.extra_share}, but there is no extra-data to take a share of")
        if data.epoch_images is not None:
            count("epoch-images", data.epoch_images, 1)
        in_files = data.name not in NAMES
        for name in OF_FILES:
            if not in_files and getattr(data, name) != LATER_OF_DATA[name]:
                told = name.replace("_", "-")
                raise InputError(
                    f"{told} is given, but data is {data.name}; it is for images in files (folder:, shards:)"
                )
        for name in ("extra_data", "epoch_images", "root"):
            if in_files and getattr(data, name) is not None:
                told = {"root": "data-root"}.get(name, name.replace("_", "-"))
                raise InputError(
                    f"{told} is given, but data is {data.name}; it is for data sets that afd knows by name"
                )
        if data.image_size is not None:
            Sizing.of(data.image_size, data.resize)
        if data.resize is not None and data.image_size is None:
            raise InputError(f"resize is {data.resize}, but image-size is missing")
        if data.workers is not None:
            count("workers", data.workers, 0)
        if data.test_share is not None and not 0 < data.test_share < 1:
            raise InputError(f"test-share is {data.test_share}; it must be a share between 0 and 1")
        if data.crop_scale is not None and not 0 < data.crop_scale <= 1:
            raise InputError(f"crop-scale is {data.crop_scale}; it must be a share of an image, in (0, 1]")
        if data.crop_scale is not None and data.augment is False:
            raise InputError(f"crop-scale is {data.crop_scale}, but augment is False; nothing is cropped then")
        if resolutions_of(data.resolutions) and data.image_size is None:
            raise InputError("resolutions are given, but image-size is missing: the side that is validated and tested")

    def _check_test(self) -> None:
        test = self.test
        if test.union is not None and (test.eps is not None or test.norm != "Linf"):
            raise InputError(f"union is {test.union!r}, and norm or eps is given; it names the radius in each norm")
        for eps in self._radii_in_levels():
            for name, length in (("eps", eps), ("alpha", getattr(self.attack, "alpha", None))):
                if length is not None and length > 1:
                    raise InputError(
                        f"{name} is {length:g}; images lie in [0, 1], so it is at most 1{in_levels(length)}"
                    )

    def _radii_in_levels(self) -> list[float]:
        """The radii of the test, of a settled config, that may be told in grey levels."""
        balls = self.test.pgd(1, 0).balls
        return [float(eps) for norm, eps in balls.items() if NORMS[norm].in_levels]

    def _check_seeds(self) -> None:
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds are {', '.join(map(str, self.seeds))}, of which two are the same")
        if self.seeds and self.seed:
            raise InputError(f"seed is {self.seed} and seeds are given; name one of the two")
        if self.seeds and self.resume not in (None, "auto"):
            raise InputError(f"resume is {self.resume}, of one run; several seeds go on with auto")

    def _check_paths(self) -> None:
        if self.out is not None:
            check_target("out", self.out)
        data = (("data-root", self.data.root), ("extra-data", self.data.extra_data))
        for name, path in (("weights", self.weights), ("resume", self.resume), *data):
            if path is not None:
                check_path(name, path)
        if self.overwrite and self.out is None:
            raise InputError("overwrite is set, but out is not; the numbered folders are never overwritten")

    @property
    def attack(self) -> Any:
        """Settings of the training attack, if the method has one."""
        return None if self.method is None else self.method.attack

    def warnings(self) -> list[str]:
        """What is allowed, of a settled config, and yet hardly meant."""
        found = []
        attacks = self.method is not None and self.method.ball is not None
        if self.eps_warmup and not attacks:
            found.append(f"eps-warmup is {self.eps_warmup:g}, but the method attacks nothing; it has no effect")
        told = f"from {GREY} on, any image may become the same grey as any other, and nothing can be learnt"
        large = [eps for eps in self._radii_in_levels() if attacks and eps >= GREY]
        return found + [f"eps is {eps:g}: {told}{in_levels(eps)}" for eps in large]

    def as_json(self) -> dict[str, Any]:
        """Plain types only, for a checkpoint's metadata; `from_json` reads them."""
        plain: dict[str, Any] = {
            one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "method"
        }
        for name in ("data", "model", "test"):
            plain[name] = dataclasses.asdict(plain[name])
        data = plain["data"]
        for place, name in ((plain, "out"), (plain, "weights"), (data, "root"), (data, "extra_data")):
            place[name] = None if place[name] is None else str(place[name])
        parts = (plain["model"], LATER_OF_MODEL), (plain["test"], LATER_OF_TEST)
        for place, later in ((plain, LATER), (data, LATER_OF_DATA), *parts):
            for name in [name for name, without in later.items() if place[name] == without]:
                del place[name]
        return plain | {"method": None if self.method is None else described(self.method)}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> TrainConfig:
        """The run that `as_json`, or a file of the same form, describes; numbers may be fractions as "8/255".

        Raises:
            InputError: it names what there is not.
        """
        given = dict(plain)
        for name in PARTS:
            if given.get(name) is not None and not isinstance(given[name], Mapping):
                raise InputError(f"{name} is {given[name]!r}; it must be a table, [{name}]")
        parts: dict[str, Any] = {"method": made(without_fractions(given.pop("method")))} if given.get("method") else {}
        given.pop("method", None)
        for name, kind in (("data", DataConfig), ("model", ModelConfig), ("test", TestConfig)):
            parts[name] = _of(kind, given.pop(name, {}), name)
        return _of(cls, given | parts, "the run")

    def as_toml(self) -> str:
        """A file that `read` reads, and ``afd train --config`` repeats: all but where results go."""
        untold = OUTCOME if self.method is None or ball_of(self.method) is None else (*OUTCOME, "test")
        plain = _stated({name: one for name, one in self.as_json().items() if name not in untold})
        return f"# afd train --config run.toml repeats this run\n{tomli_w.dumps(plain)}"

    @classmethod
    def read(cls, path: Path) -> TrainConfig:
        """The run that a TOML file, or a recipe of that name, describes.

        Raises:
            InputError: there is no such file or recipe, it is no TOML, or it names what there is not.
        """
        check_path("config", path)
        named = RECIPES / f"{path}.toml"
        if not path.exists() and len(path.parts) == 1 and named.is_file():
            path = named
        if not path.is_file():
            raise InputError(f"config is {path}; there is no such file, and recipes are {', '.join(recipes())}")
        try:
            found = cls.from_json(tomllib.loads(path.read_text()))
            check_data(found.data.name)
            return found
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise InputError(f"config is {path}, which cannot be read: {in_a_line(error)}") from error
        except InputError as error:
            raise InputError(f"config is {path}: {in_a_line(error)}") from error


def _check_network(model: ModelConfig) -> None:
    """Raises InputError where a setting of the network is out of its range, whatever the data."""
    if model.new_head is not None:
        count("new-head", model.new_head, 2)
    if not 0 <= model.drop_path < 1:
        raise InputError(f"drop-path is {model.drop_path}; it must be a share in [0, 1)")
    if "" in model.freeze:
        raise InputError("freeze has a pattern without a letter; patterns are of parameters' names, such as 'layer1.*'")


def recipes() -> list[str]:
    """Names of the runs that come with afd, each a TOML file that says what was found with it, if it was run."""
    return sorted(file.stem for file in RECIPES.glob("*.toml"))


def ball_of(method: Method) -> TestConfig | None:
    """The ball that a method trains against, if there is one."""
    ball = method.ball
    if isinstance(ball, UnionSettings):
        return TestConfig(union=words_of(ball))
    return TestConfig(ball.norm, float(ball.eps)) if isinstance(ball, AttackSettings) else None


def _stated(plain: Mapping[str, Any]) -> dict[str, Any]:
    """What TOML can say: nothing is left out there."""
    found = {name: _stated(one) if isinstance(one, Mapping) else one for name, one in plain.items()}
    return {name: one for name, one in found.items() if one is not None and one != {}}


_Config = TypeVar("_Config", DataConfig, ModelConfig)
_Kind = TypeVar("_Kind")


def _of(kind: type[_Kind], given: Mapping[str, Any], told: str) -> _Kind:
    """A dataclass of what was read.

    Raises:
        InputError: it has no such field, or a path is none.
    """
    known = {one.name for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise InputError(f"{told} has no setting {name!r}; it has {', '.join(sorted(known))}")
    values: dict[str, Any] = {
        name: tuple(one) if isinstance(one, list) else one for name, one in without_fractions(given).items()
    }
    hints = get_type_hints(kind)
    for name, one in values.items():
        if name not in PARTS and not fits(one, hints[name]):
            raise InputError(f"{name} is {one!r}, a {type(one).__name__}; {told} has {in_words(hints[name])} there")
    return kind(**{name: Path(one) if name in PATHS and one is not None else one for name, one in values.items()})


def _filled(config: _Config, **defaults: Any) -> _Config:
    """`config` with `defaults` in the fields that are None."""
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)
