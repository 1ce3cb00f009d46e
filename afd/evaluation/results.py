"""The result of an evaluation as plain data: what results.json holds, and how it is read back."""

from __future__ import annotations

import json
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from afd._version import __version__
from afd.data import Images
from afd.errors import AfdError
from afd.evaluation.checks import Check, overall
from afd.evaluation.outcome import Outcome, normalised_area
from afd.evaluation.protocol import Stage
from afd.evaluation.subject import Subject
from afd.evaluation.target import NORMS
from afd.files import check_source, write_whole
from afd.nn.classifier import unwrapped

FORMAT, VERSION = "afd-evaluation", 1
FILE = "results.json"


class ResultsError(AfdError):
    """A folder holds no results that this afd can read."""


def summary(
    outcome: Outcome,
    *,
    subject: Subject,
    surrogate: Subject | None,
    images: Images,
    split: str,
    checks: list[Check],
    features: dict[str, Any] | None,
    divergence: list[dict[str, Any]],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Everything there is to say about an evaluation, in plain types.

    Args:
        outcome: gathered over all processes.
        subject: the model.
        surrogate: the model that transfer attacks were made on.
        images: what was attacked, from the first of their split on.
        split: which part of the data they are.
        checks: for self-deception.
        features: see `features.feature_summary`.
        divergence: see `features.divergences`.
        settings: seed, batch size, processes and whatever else the run was given.
    """
    protocol = outcome.protocol
    return {
        "format": FORMAT,
        "version": VERSION,
        "subject": describe(subject),
        "surrogate": None if surrogate is None else describe(surrogate),
        "data": {
            "name": images.name,
            "split": split,
            "images": f"the first {len(images)}",
            "count": len(images),
            "shape": list(images.shape),
            "classes": images.num_classes,
        },
        "protocol": protocol.as_json(),
        "verdict": overall(checks),
        "clean": float(outcome.correct.double().mean()),
        "attacks": [attack_summary(outcome, stage) for stage in protocol.stages],
        "worst_case": {norm: worst for norm in NORMS if (worst := outcome.worst_case(norm))},
        "checks": [check.as_json() for check in checks],
        "features": features,
        "divergence": divergence,
        "settings": settings,
        "versions": {"afd": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"device": device_name(images.device), "system": platform.system()},
    }


def describe(subject: Subject) -> dict[str, Any]:
    """A model in plain types."""
    return {
        "name": subject.name,
        "source": subject.source,
        "sha256": subject.digest(),
        "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
        "architecture": architecture(subject),
        "metadata": subject.metadata,
    }


def architecture(subject: Subject) -> str:
    """What a table calls the network."""
    model = subject.said("network", "recipe") or subject.said("config", "model")
    if isinstance(model, dict) and {"name", "width"} <= set(model):
        return f"{model['name']} (width {model['width']})"
    return type(unwrapped(subject.model)).__name__


def attack_summary(outcome: Outcome, stage: Stage) -> dict[str, Any]:
    """A stage with its accuracies and the area under them."""
    accuracies, counts = outcome.accuracies(stage), outcome.counts.get(stage.name, Counter())
    curve = [float(outcome.correct[: stage.first].double().mean()), *accuracies]
    points = [
        {**epsilon.as_json(), "accuracy": accuracy, "blind": blind}
        for epsilon, accuracy, blind in zip(stage.epsilons, accuracies, outcome.blind(stage), strict=True)
    ]
    return {
        **stage.as_json(),
        "accuracies": points,
        "area": normalised_area([0.0, *map(float, stage.epsilons)], curve),
        "attacked": counts.get("attacked", 0),
        "illegal": counts.get("illegal", 0),
        "not_finite": counts.get("not finite", 0),
        "seconds": counts.get("milliseconds", 0) / 1000,
    }


def device_name(device: torch.device) -> str:
    """What the evaluation ran on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"


def write(folder: Path, results: dict[str, Any]) -> None:
    """Writes results.json, whole or not at all.

    Raises:
        FileError: it cannot be written.
    """
    write_whole(folder / FILE, json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> dict[str, Any]:
    """The results in a folder of an evaluation, or in its results.json.

    Raises:
        ResultsError: there are none, or they are of another version.
    """
    check_source("compare", path)
    file = path / FILE if path.is_dir() else path
    check_source("compare", file)
    if not file.is_file():
        raise ResultsError(f"{path} holds no {FILE}; compare takes folders that afd evaluate has finished")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{file} is not JSON: {error}") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise ResultsError(f"{file} is not the result of an afd evaluation")
    if results.get("version") != VERSION:
        raise ResultsError(f"{file} has version {results.get('version')}; this afd reads {VERSION}")
    return results
