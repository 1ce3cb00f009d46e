"""What every method learns on digits in about a minute, on one thread: ``python benchmarks/learn.py [METHOD ...]``.

Runs ``afd train`` as a user would and gathers the ``result.json`` of each run; README's table follows. Named methods
are trained again and take the place of what the file holds of them.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from afd.bench.results import Candidate, Case, Document, read
from afd.errors import AfdError
from afd.machine import device_name

RESULTS = Path(__file__).parent / "results"
EPOCHS = "--epochs 30"
RUNS = {
    "natural": f"natural {EPOCHS}",
    "at": f"at {EPOCHS}",
    "at, worst of three balls": f"at {EPOCHS} --attack union",
    "fgsm-rs": f"fgsm-rs {EPOCHS}",
    "free": f"free {EPOCHS}",
    "trades": f"trades {EPOCHS}",
    "mart": f"mart {EPOCHS} --lr 0.1 --weight-decay 7e-4",
    "alp": f"alp {EPOCHS}",
    "norm-penalty": f"norm-penalty {EPOCHS}",
    "llr": f"llr {EPOCHS} --activation silu --eps-warmup 10 --batch-size 64",
    "gat": f"gat {EPOCHS}",
    "nuat": f"nuat {EPOCHS} --ramps weight=0:27",
    "jarn": f"jarn {EPOCHS} --start-step 165 --update-interval 5",
    "at+awp": f"at+awp {EPOCHS} --eps-warmup 10",
    "trades+awp": f"trades+awp {EPOCHS}",
    "afd": f"afd {EPOCHS} --batch-size 64",
    "afd, adversarial weight": f"afd {EPOCHS} --batch-size 64 --adversarial-weight 0.5",
}


def trained(words: str) -> Case:
    """One run: its accuracies, in [0, 1], and how long it took."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "afd", "train", *shlex.split(words), "--data", "digits", "--out", folder]
        began = time.perf_counter()
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        found = json.loads((Path(folder) / "result.json").read_text())
    candidates = {
        name: Candidate(None, {key: one[key] for key in ("epoch", "natural", "robust")})
        for name, one in found["measured"].items()
    }
    told = ("data", "seed", "images", "attack", "norm", "eps", "union")  # one ball, or several
    settings = {key: found[key] for key in told if key in found}
    settings["alarms"] = "; ".join(alarm["kind"] for alarm in found["alarms"])
    return Case({"command": f"afd train {words}", **settings}, candidates, {"seconds": seconds})


def main(names: list[str]) -> None:
    """Trains, and writes the file after each run."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    file = RESULTS / f"learning-digits-{device_name(device).lower().replace('(r)', '').replace(' ', '-')}.json"
    held = read(file).cases if file.exists() else {}
    for name in names or list(RUNS):
        held = {**held, name: trained(RUNS[name])}
        cases = {known: held[known] for known in RUNS if known in held}
        document = Document.here("learning", device, 1, {}, cases)
        replace(document, finished=set(held) == set(RUNS)).write(file)
        print(name, {key: one.figures for key, one in held[name].candidates.items()}, held[name].measured, flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (AfdError, KeyError) as error:
        sys.exit(f"learn.py: error: {error}")
