"""`afd train --seeds 0,1,2`: one run for each seed, one after the other, and how far apart they end.

A figure of one seed says little: seeds of adversarial training differ by as much as methods do.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from typing import Any

from afd.config import TrainConfig
from afd.data import Splits
from afd.data.datasets import short
from afd.errors import AfdError
from afd.experiments import train as experiment
from afd.experiments.assembly import splits_for
from afd.experiments.folder import run_folder
from afd.experiments.train import Measured
from afd.files import write_whole
from afd.installation import needed_by
from afd.methods.registry import spelled
from afd.runtime import commit, device_named, join

with needed_by("afd.experiments.seeds"):
    from rich.console import Console
    from rich.table import Table

FIGURES = ("natural", "robust")
BySeed = dict[int, dict[str, Measured]]


def train_seeds(config: TrainConfig, console: Console | None = None, splits: Splits[Any] | None = None) -> BySeed:
    """A run for each of a config's seeds, in ``seed-0`` and so on below its folder, then a table and ``seeds.json``.

    With ``resume="auto"`` each goes on where it was left, and one that is finished is measured again only. Under
    torchrun, every process calls this.

    Args:
        config: the runs; its `seeds` take the place of its seed.
        console: where to print; by default the terminal.
        splits: the data, where the caller has it already.

    Returns:
        What each seed's checkpoints reach on the test images.

    Raises:
        AfdError: as of `afd.experiments.train.train`; it says which seed's run has ended, and how to go on.
    """
    config = config.settled()
    group = join(device_named(config.device))
    console = (console or Console(emoji=False)) if group.leads else Console(quiet=True)
    with run_folder(config.out, config.resume, group, overwrite=config.overwrite) as folder:
        file = folder / "seeds.json"
        if config.overwrite and group.leads:
            file.unlink(missing_ok=True)
        if splits is None:
            splits = splits_for(config)
        found, stopped = BySeed(), list[str]()
        for seed in config.seeds:
            one = dataclasses.replace(config, seed=seed, seeds=(), out=folder / f"seed-{seed}")
            try:
                found[seed] = experiment.train(one, console, splits, advised=folder).measured
            except experiment.AlarmError as alarm:  # the others may do better
                found[seed], stopped = alarm.measured, [*stopped, f"seed {seed}: {alarm}"]
            except (AfdError, KeyboardInterrupt) as error:
                error.args = (f"seed {seed}: {error}",)
                raise
        if group.leads:
            write_whole(file, _as_json(config, found, len(splits.limited(config.data.limit).test)))
    console.print(_table(config, found))
    console.print(f"figures: {file}", soft_wrap=True, markup=False, highlight=False)
    if stopped:
        raise experiment.AlarmError("; ".join(stopped))
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation (of n - 1; none of a single value) and range of values."""
    found = {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}
    return found | ({"std": statistics.stdev(values)} if len(values) > 1 else {})


def _spreads(found: BySeed) -> dict[str, dict[str, dict[str, float]]]:
    """The spread of each figure of each checkpoint, over the seeds."""
    names = next(iter(found.values()))
    return {
        name: {figure: spread([getattr(one[name], figure) for one in found.values()]) for figure in FIGURES}
        for name in names
    }


def _as_json(config: TrainConfig, found: BySeed, images: int) -> str:
    assert config.method is not None
    plain: dict[str, Any] = {
        "data": config.data.name,
        "method": spelled(config.method),
        "images": images,
        "attack": f"PGD-{experiment.TEST_STEPS}",
        **experiment.ball_as_json(config),
        "commit": commit(),
        "seeds": {
            str(seed): {name: dataclasses.asdict(measured) for name, measured in one.items()}
            for seed, one in found.items()
        },
        "spread": _spreads(found),
    }
    return json.dumps(plain, indent=1) + "\n"


def _table(config: TrainConfig, found: BySeed) -> Table:
    assert config.method is not None
    title = f"{short(config.data.name)} {spelled(config.method)}: {len(found)} seeds"
    table = Table(title=title, title_justify="left")
    for column in ("checkpoint", "seed", "natural", f"PGD-{experiment.TEST_STEPS}"):
        table.add_column(column)
    for name, of_both in _spreads(found).items():
        for seed, one in found.items():
            table.add_row(name, str(seed), *(f"{getattr(one[name], figure):.2%}" for figure in FIGURES))
        table.add_row(name, "mean ± deviation", *(_mean(of_both[figure]) for figure in FIGURES))
        ranges = (f"{100 * one['min']:.2f} to {one['max']:.2%}" for one in of_both.values())
        table.add_row(name, "range", *ranges, end_section=True)
    return table


def _mean(one: dict[str, float]) -> str:
    return f"{100 * one['mean']:.2f} ± {one['std']:.2%}" if "std" in one else f"{one['mean']:.2%}"
