"""What `afd plan` does: says what a run is going to cost, from a trial of it, and what to change where it does not fit.

It trains nothing to keep. Each batch size is tried in a process of its own (`afd.experiments.trial`), whose memory is
that of a run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

from afd.config import TrainConfig
from afd.data.datasets import short
from afd.data.stored import usual_workers
from afd.errors import AfdError, InputError
from afd.experiments.folder import ROOT, check_files
from afd.experiments.spent import PLAN, described, duration, size
from afd.experiments.train import TEST_STEPS
from afd.experiments.trial import growth
from afd.files import write_whole
from afd.installation import needed_by
from afd.methods.registry import spelled
from afd.processes import launched
from afd.runtime import commit

with needed_by("afd.experiments.plan"):
    from rich.console import Console
    from rich.table import Table

SECONDS = 60.0
SHARES = {"batch": 0.5, "half": 0.1, "twice": 0.2}  # of a trial's seconds; the rest is what processes take to start
PATIENCE, STARTING = 3.0, 60.0  # a process is ended after so many times its seconds and so many more
ROOM = 0.9  # of the memory that is available: the share that a run may take
KILLED = -9  # by the system, which has no more memory
Trial = Callable[[TrainConfig, int, float, bool], dict[str, Any]]  # of a batch size, for seconds, whether whole


class TrialError(AfdError):
    """A trial has ended without an answer."""


def plan(config: TrainConfig, seconds: float = SECONDS, console: Console | None = None) -> dict[str, Any]:
    """Tries a run, prints what it will cost and, where the config names a folder, writes that into its plan.json.

    Args:
        config: the run; its unset fields are settled by its data set.
        seconds: that the trial takes, about; what is slow is tried on fewer images.
        console: where to print; by default the terminal.

    Returns:
        What ``plan.json`` says.

    Raises:
        InputError: a setting out of its range.
        AfdError: the run cannot be trained so, as of `afd.experiments.train.train`.
    """
    if launched():
        raise InputError("afd plan runs in one process; start it without torchrun")
    if not seconds > 0:
        raise InputError(f"trial is {seconds:g}; it must be a number of seconds above 0")
    config = replace(config.settled(), resume=None)
    check_files(config)
    console = console or Console(emoji=False)
    with console.status(f"trying the run for about {duration(seconds)}"):
        found = planned(config, trials(config, seconds))
    console.print(table(found))
    for line in found["advice"]:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if config.out is not None:
        write_whole(config.out / PLAN, json.dumps(found, indent=1) + "\n")
        console.print(f"plan: {config.out / PLAN}", soft_wrap=True, markup=False, highlight=False)
    return found


# --- Trials -----------------------------------------------------------------------------------------------------------


def in_process(config: TrainConfig, batch: int, seconds: float, whole: bool) -> dict[str, Any]:
    """What a trial finds in a process of its own, as of `afd.experiments.trial.trial`; "fits" is False without memory.

    Raises:
        AfdError: the run cannot be trained so.
        TrialError: the process took far too long, or broke.
    """
    asked = {"config": config.as_json() | {"out": None, "overwrite": False}}
    words = json.dumps(asked | {"batch": batch, "seconds": seconds, "whole": whole})
    home = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH", "")]))
    most = PATIENCE * seconds + STARTING
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "afd.experiments.trial"],
            input=words, capture_output=True, text=True, timeout=most, check=False,
            env={**os.environ, "PYTHONPATH": paths},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TrialError(
            f"the trial has not ended within {duration(most)}, on a few images; try it with a smaller network, smaller "
            "images or a longer --trial"
        ) from None
    if done.returncode == KILLED:
        return {"fits": False, "told": "the system has ended it"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise TrialError(f"the trial has ended with status {done.returncode}: {said[-1]}")
    answer: dict[str, Any] = json.loads(lines[-1])
    if "error" in answer:
        raise AfdError(answer["error"])
    return {"fits": True, **answer}


def trials(config: TrainConfig, seconds: float, trial: Trial = in_process) -> dict[str, dict[str, Any]]:
    """The run at this batch size, at half of it and at twice, by name; what surely has no room is not tried."""
    batch = config.data.batch_size
    found = {"batch": trial(config, batch, SHARES["batch"] * seconds, True)}
    if batch > 1:
        found["half"] = trial(config, batch // 2, SHARES["half"] * seconds, False)
    expected = _twice(found)
    available = found["batch"].get("available")
    if not found["batch"]["fits"] or (expected and available and expected > available):
        found["twice"] = {"fits": False, "memory": expected}
    else:
        found["twice"] = trial(config, 2 * batch, SHARES["twice"] * seconds, False)
    return found


def _twice(found: dict[str, dict[str, Any]]) -> int | None:
    """Bytes that twice the batch takes, along the line through half of it and all of it."""
    half, batch = (found.get(name, {}).get("memory") for name in ("half", "batch"))
    return None if half is None or batch is None else round(batch + 2 * max(0, batch - half))


# --- What follows from them -------------------------------------------------------------------------------------------


def planned(config: TrainConfig, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What ``plan.json`` says of a settled run, by what its trials have found."""
    whole = found["batch"]
    memory = {name: one.get("memory") if one["fits"] else None for name, one in found.items()}
    free = _free(ROOT if config.out is None else config.out)
    plain: dict[str, Any] = {
        "run": described(config),
        "commit": commit(),
        "device": whole.get("device"),
        "memory": {
            "half": None, **memory, "available": whole.get("available"),
            "fits": {name: one["fits"] for name, one in found.items()},
        },
    }  # fmt: skip
    if whole["fits"]:
        speed = _speed(config, whole)
        plain |= {
            "passes": whole["passes"],
            "speed": speed,
            "time": _time(config, whole, 1 / speed["images_per_second"]),
            "disk": {**_disk(config, whole), "free": free},
        }
    else:
        plain |= {"passes": None, "speed": None, "time": {"epoch": None}, "disk": None}
    return plain | {"advice": advice(config, plain)}


def _speed(config: TrainConfig, whole: dict[str, Any]) -> dict[str, Any]:
    """Images a second: of training, of its steps alone and, of data in files, of loading alone, and who would do."""
    steps, loading = 1 / whole["stepping"], whole.get("loading")
    found = {
        "images_per_second": min(1 / whole["seconds"], loading or 1 / whole["seconds"]),
        "steps": steps,
        "tried_on": whole["images"],
        "loading": loading,
    }
    if loading is not None:
        workers = config.data.workers
        used = usual_workers() if workers is None else max(1, workers)
        found |= {"workers": used, "workers_that_do": max(1, ceil(used * steps / loading))}
    return found


def _time(config: TrainConfig, whole: dict[str, Any], each: float) -> dict[str, float]:
    """Seconds of an epoch and of the run, its test included."""
    assert config.epochs is not None
    sizes, passes = whole["sizes"], whole["passes"]
    share = 1.0 if passes is None else passes["cost"] / passes["timed"]
    training = sizes["epoch"] * each * share * growth(config)  # steps take about as long as images are large
    validation = sizes["validation"] * whole["validation"]
    states = min(2 + (config.ema is not None), config.epochs + (config.ema is not None))  # best, last, average
    each_tested = whole["test"]
    if passes is not None:  # a test tried on few images is slow: passes of a step are known better
        each_tested = min(each_tested, whole["seconds"] / passes["timed"] * (2 * TEST_STEPS + 2))
    test = states * sizes["test"] * each_tested
    run = config.epochs * (training + validation) + test
    return {
        "training": training,
        "validation": validation,
        "epoch": training + validation,
        "test": test,
        "run": max(1, len(config.seeds)) * run,
    }


def _disk(config: TrainConfig, whole: dict[str, Any]) -> dict[str, int]:
    """Bytes of checkpoints: one, what an epoch writes where it is the best so far, and what a run keeps."""
    one, back = whole["checkpoint"], config.on_alarm == "rollback"  # which keeps good.pt
    return {
        "checkpoint": one,
        "epoch": one * (2 + back),  # last.pt, best.pt
        "run": max(1, len(config.seeds)) * (one * (3 + back) + whole["weights"]),  # and previous.pt, model.pt
    }


def _free(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    return shutil.disk_usage(there).free


# --- What to change ---------------------------------------------------------------------------------------------------


def advice(config: TrainConfig, plain: dict[str, Any]) -> list[str]:
    """What to change where memory, disk or loading does not suffice, one line each; none where all fits."""
    lines = []
    memory, available = plain["memory"], plain["memory"]["available"]
    batch = memory["batch"]
    if not memory["fits"]["batch"] or (batch and available and batch > ROOM * available):
        told = "takes more memory than there is" if batch is None else f"takes {size(batch)} of {size(available)}"
        lines.append(f"memory: a batch of {config.data.batch_size} {told}; {', or '.join(_smaller(config, memory))}")
    elif not memory["fits"]["twice"] or (memory["twice"] and available and memory["twice"] > ROOM * available):
        lines.append(f"memory: a batch of {2 * config.data.batch_size} would not fit")
    disk, speed = plain["disk"], plain["speed"]
    if disk and disk["run"] + disk["checkpoint"] > disk["free"]:
        lines.append(
            f"disk: checkpoints take {size(disk['run'])} of {size(disk['free'])} that are free; name another --out"
        )
    if speed and speed["loading"] is not None and speed["loading"] < speed["steps"]:
        cores, wanted = os.cpu_count() or 1, speed["workers_that_do"]
        more = (
            f"--workers {wanted} would do"
            if wanted <= cores
            else f"--workers {cores} is what the cores allow, of {wanted} that would do; smaller files, or a smaller "
            "--image-size, are decoded faster"
        )
        lines.append(
            f"loading: {speed['loading']:,.0f} images/s with {speed['workers']} workers, fewer than the "
            f"{speed['steps']:,.0f} that are trained on; {more}"
        )
    return lines


def _smaller(config: TrainConfig, memory: dict[str, Any]) -> list[str]:
    """Options that take less memory than a run's own, those that change nothing of it first."""
    method: Any = getattr(config.method, "core", config.method)
    parts = getattr(method, "micro_batches", None)
    found = []
    if parts is not None and not method.coupled:
        found.append(f"--micro-batches {2 * parts} (updates stay those of the whole batch)")
    if not config.checkpoint_activations:
        found.append("--checkpoint-activations (slower by about a third)")
    if config.precision == "fp32":
        found.append("--precision auto")
    if memory["fits"].get("half") and config.data.batch_size > 1:
        found.append(f"--batch-size {config.data.batch_size // 2}")
    if config.model.width is not None and ":" not in (config.model.name or ""):
        found.append(f"--width {max(1, config.model.width // 2)}")
    if config.data.image_size is not None:
        found.append(f"--image-size {config.data.image_size // 2}")
    return found


# --- In words ---------------------------------------------------------------------------------------------------------


def table(plain: dict[str, Any]) -> Table:
    """A plan as it is shown."""
    config = TrainConfig.from_json(plain["run"])
    assert config.method is not None
    place = plain["device"] or "this machine"
    title = f"{short(config.data.name)} {spelled(config.method)}: {config.epochs} epochs on {place}"
    shown = Table(title=title, title_justify="left")
    for column in ("what", "figure", ""):
        shown.add_column(column)
    for row in (*_passes_rows(plain), *_time_rows(plain), *_memory_rows(plain, config.data.batch_size)):
        shown.add_row(*row)
    disk = plain["disk"]
    if disk is not None:
        shown.add_row("disk, an epoch writes", size(disk["epoch"]), f"checkpoints of {size(disk['checkpoint'])}")
        shown.add_row("disk, the run keeps", size(disk["run"]), f"of {size(disk['free'])} that are free")
    return shown


def _passes_rows(plain: dict[str, Any]) -> list[tuple[str, str, str]]:
    passes = plain["passes"]
    if plain["speed"] is None:
        return []
    if passes is None:
        return [("passes", "not counted", "the network has nothing that they could be counted by")]
    kinds = passes["image"]
    told = (
        "by operations"
        if kinds is None
        else f"{kinds['forwards']:.3g} forward, {kinds['input_backwards']:.3g} to the input, "
        f"{kinds['weight_backwards']:.3g} to the weights"
    )
    return [
        ("passes, an image of an epoch", f"{passes['cost']:.3g}", told),
        ("passes, the run", f"{passes['run']:,.0f}" if passes["run"] < 1e6 else f"{passes['run']:.3g}", ""),
    ]


def _time_rows(plain: dict[str, Any]) -> list[tuple[str, str, str]]:
    speed, times = plain["speed"], plain["time"]
    if speed is None:
        return []
    batch = plain["run"]["data"]["batch_size"]
    fewer = f"tried on {speed['tried_on']} images at once" if speed["tried_on"] < batch else "attack included"
    rows = [("images/s in training", _rate(speed["images_per_second"]), fewer)]
    if speed["loading"] is not None:
        limit = "loading" if speed["loading"] < speed["steps"] else "training"
        rows.append(
            (
                "images/s of loading alone",
                _rate(speed["loading"]),
                f"the limit is {limit}; workers that would do: {speed['workers_that_do']} (now {speed['workers']})",
            )
        )
    parts = f"{duration(times['training'])} training, {duration(times['validation'])} validation"
    return [
        *rows,
        ("time, an epoch", duration(times["epoch"]), parts),
        ("time, the run", duration(times["run"]), f"of it {duration(times['test'])} test"),
    ]


def _rate(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"


def _memory_rows(plain: dict[str, Any], batch: int) -> list[tuple[str, str, str]]:
    memory, rows = plain["memory"], []
    of = "" if memory["available"] is None else f"of {size(memory['available'])} available"
    for name, images in (("half", batch // 2), ("batch", batch), ("twice", 2 * batch)):
        if name not in memory["fits"]:
            continue
        held, fits = memory[name], memory["fits"][name]
        rows.append((f"memory, batches of {images}", size(held) if held else "unknown" if fits else "does not fit", of))
    return rows
