"""Every kernel once against the CPU, in seconds: ``python benchmarks/smoke.py --device cuda --out FILE.json``.

On CUDA a case is held to the CPU kernel, on the CPU to the PyTorch reference, so that this script runs anywhere. Small
enough for compute-sanitizer. The JSON is written after each case, and valid at any moment.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from gpu_day.results import write
from torch import Tensor

from afd.bench.op_cases import EXACT, OpCase, small
from afd.ops import backend


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all cases; 1 if any failed."""
    parser = argparse.ArgumentParser(prog="smoke.py", description="Every kernel once against the CPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    given, began = parser.parse_args(arguments), time.monotonic()
    if given.out.is_dir():
        parser.error(f"--out is {given.out}; it must be the name of a file")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda; torch sees no CUDA device")
    told: dict[str, Any] = {"device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu"}
    told |= {"cases": {}, "finished": False}
    alive = True
    for case in small():
        found = told["cases"][case.name] = verdict(case, given.device)
        write(given.out, told)
        if not found["ok"]:
            print(f"{case.name}: {found['words']}", flush=True)
            alive = given.device == "cpu" or context_lives()
        if not alive:
            print("smoke: the CUDA context is lost; the cases that were left have not run", flush=True)
            break
    write(given.out, {**told, "finished": alive})
    failed = sum(not found["ok"] for found in told["cases"].values())
    print(f"smoke: {len(told['cases'])} cases, {failed} failed, {time.monotonic() - began:.1f} s", flush=True)
    return 1 if failed else 0


def verdict(case: OpCase, device: str) -> dict[str, Any]:
    """Whether both sides agree, in every byte or within a share of the largest value; an exception is a failure."""
    try:
        for got, want in zip(*both(case, device), strict=True):
            if case.tolerance == EXACT:
                same = got.shape == want.shape, got.dtype == want.dtype
                assert all(same), f"{list(got.shape)} {got.dtype} came out, not {list(want.shape)} {want.dtype}"
                got, want = (one.cpu().flatten().view(torch.uint8) for one in (got, want))
            largest = want.abs().max().item() if want.numel() else 0
            torch.testing.assert_close(got.cpu(), want, rtol=0, atol=case.tolerance * max(1, largest))
        words = ""
    except Exception as problem:
        words = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
    return {"ok": not words, "tolerance": case.tolerance, "words": words}


def both(case: OpCase, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """The results of the kernels on the device, and of what they are held to."""
    aside = device == "cuda" and case.batch.layout == "side stream"
    with backend.use("native"), torch.cuda.stream(torch.cuda.Stream()) if aside else nullcontext():
        got = case.on(device).results()
    if device == "cuda":
        torch.cuda.synchronize()  # what went wrong shows here, in its own case
    with backend.use("native" if device == "cuda" else "reference"):
        return got, case.on("cpu").results()


def context_lives() -> bool:
    """Whether this process can still use the GPU after an error on it."""
    try:
        torch.zeros(1, device="cuda").add_(1).item()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
