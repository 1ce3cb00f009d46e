"""What a run has cost, for its report, and how far its plan was off."""

from __future__ import annotations

import json
from typing import Any

import torch

from afd.config import TrainConfig
from afd.errors import InputError, in_a_line
from afd.machine import device_with_threads
from afd.training.position import Spent
from afd.training.settings import differences

PLAN = "plan.json"
FREE = ("out", "overwrite", "resume", "epochs", "seed", "seeds", "weights")  # which change neither time nor memory


def cost_as_json(spent: Spent, device: torch.device, config: TrainConfig) -> dict[str, Any]:
    """What ``result.json`` says under "cost" of a run that has ended.

    Args:
        spent: by the run, what lies before checkpoints that it went on from included.
        device: that it ran on.
        config: of the run, settled, in whose folder its plan may lie.
    """
    known = spent.state_dict(device)
    found = {
        "hours": known["seconds"] / 3600,
        "seconds_per_epoch": known["seconds"] / known["epochs"] if known["epochs"] else None,
        "images_seen": known["images"],
        "device": device_with_threads(device),
        "peak_memory": known["memory"],
    }
    planned = plan_of(config)
    return found if planned is None else {**found, "plan": off(planned, found)}


def plan_of(config: TrainConfig) -> dict[str, Any] | None:
    """What ``afd plan`` has said of a run in its folder; None where it has not, or has said it of another run.

    Raises:
        InputError: it cannot be read.
    """
    assert config.out is not None
    file = config.out / PLAN
    if not file.is_file():
        return None
    try:
        plan = json.loads(file.read_text())
        other = differences(plan["run"], described(config), FREE)
        planned = {"seconds_per_epoch": plan["time"]["epoch"], "peak_memory": plan["memory"]["batch"]}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{file} is no plan of afd plan: {in_a_line(error)}; remove it") from error
    return None if other else planned


def described(config: TrainConfig) -> dict[str, Any]:
    """A settled run in plain JSON, as its plan keeps it."""
    plain: dict[str, Any] = json.loads(json.dumps(config.as_json()))
    return plain


def off(planned: dict[str, Any], found: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """What was planned beside what was found, and by how many percent that is more (or, below 0, less)."""
    told = {}
    for name, expected in planned.items():
        real = found[name]
        known = bool(expected) and real is not None
        told[name] = {"planned": expected, "found": real, "percent": 100 * (real / expected - 1) if known else None}
    return told


# --- In words ---------------------------------------------------------------------------------------------------------


def cost_lines(cost: dict[str, Any]) -> list[str]:
    """The same for the terminal."""
    lines = [
        f"cost: {duration(3600 * cost['hours'])} in training, {cost['images_seen']:,} images seen, "
        f"at most {size(cost['peak_memory'])} of memory, on {cost['device']}"
    ]
    told = {"seconds_per_epoch": ("an epoch", duration), "peak_memory": ("memory", size)}
    for name, one in cost.get("plan", {}).items():
        if one["percent"] is not None:
            what, words = told[name]
            more = "above" if one["percent"] >= 0 else "below"
            found, planned = words(one["found"]), words(one["planned"])
            lines.append(f"plan: {what}, {found}, is {abs(one['percent']):.0f}% {more} the {planned} planned")
    return lines


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.0f} h" if seconds >= 36000 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
