"""What compare.json holds, made up: figures that hang together, with the bits of which they are counts."""

from __future__ import annotations

import torch

from afd.metrics import packed

MADE = {
    "machine": {"device": "AMD EPYC, 1 thread", "system": "Linux"},
    "versions": {"afd": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.7"}, "commit": "0123abc",
}  # fmt: skip
CHECK = {"name": "Square beats white-box", "verdict": "fail", "number": 0.021, "unit": "of the images", "allowed": 0.01}
CHECK |= {"meaning": "Square, which knows no gradient, breaks what gradients leave"}
ALARM = {"kind": "catastrophic overfitting", "epoch": 4, "told": "one step 99%, many 2%", "helps": "more steps help"}


def run(folder, images, clean, attacked, *, seed=0, verdict="pass", seconds=300.0, transfer=None, alarms=()):
    """A seed that is done: `clean` and `attacked` images that are right, as shares."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(images, generator=generator)  # an image that is hard for one attack is hard for all
    right = {
        "clean": order < clean,
        "pgd-40": order < attacked + 0.6 * (clean - attacked),
        "autoattack": order < attacked,
        "worst": order < attacked,
    }
    right |= {} if transfer is None else {"transfer": order < transfer}
    shares = {name: float(one.double().mean()) for name, one in right.items()}
    checks = [CHECK | {"verdict": verdict}] if verdict != "pass" else [CHECK | {"verdict": "pass", "number": 0.0}]
    return {
        "state": "done", "error": None, "seconds": seconds, "alarms": list(alarms), "made": MADE,
        "measured": {
            "best": {"epoch": 5, "natural": shares["clean"], "robust": shares["pgd-40"]},
            "last": {"epoch": 6, "natural": shares["clean"] / 2, "robust": shares["pgd-40"] / 2},
        },
        "evaluation": {
            "folder": folder, "seconds": 60.0, **shares, "transfer": shares.get("transfer"),
            "verdict": verdict, "checks": checks,
            "withstood": {name: packed(one) for name, one in right.items()},
        },
    }  # fmt: skip


def entry(name, figures, *, images=1000, method=None, passes=8.4e6, **options):
    """An entry with a run for each (clean, attacked)."""
    runs = {
        str(seed): run(f"{name}/seed-{seed}/evaluation", images, *one, seed=seed, **options)
        for seed, one in enumerate(figures)
    }
    method = method or name.partition(" ")[0]
    return {
        "words": f"{method} --eps-warmup 4", "method": method, "passes_per_image": 26.0, "epochs": 6,
        "epoch_images": 54000, "passes": passes, "runs": runs,
    }  # fmt: skip


def waiting(name, state="waiting", error=None):
    """An entry that nothing is known of yet, or that failed."""
    made = entry(name, [(1.0, 1.0)], passes=None)
    made |= {"epochs": None, "passes_per_image": None}
    nothing = {"state": state, "error": error, "seconds": None, "alarms": [], "measured": {}}
    nothing |= {"evaluation": None, "made": None}
    return made | {"runs": {"0": nothing}}


def comparison(entries, *, images=1000, finished=True, **changed):
    """All of compare.json."""
    return {
        "format": "afd-comparison", "version": 1, "finished": finished,
        "data": {"name": "mnist", "images": images, "classes": 10, "train": 54000, "validation": 6000},
        "ball": {"norm": "Linf", "eps": 0.3, "text": "0.3"},
        "network": {"name": "convnet", "width": 8, "activation": "relu", "normalize": True},
        "train": "--data mnist --width 8",
        "budget": {"asked": "5m", "passes": 1.2e8, "at_images_per_second": 1190.0},
        "reference": "at", "seeds": [0], "entries": entries, **MADE,
    } | changed  # fmt: skip
