"""Every kernel once against the CPU, in seconds: ``python benchmarks/smoke.py --device cuda --out FILE.json``.

On CUDA a case is held to the CPU kernel, on the CPU to the PyTorch reference, so that this script runs anywhere. Small
enough for compute-sanitizer. The JSON is written after each case, and valid at any moment.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from smoke_cases import EXACT, Case, cases
from torch import Tensor

from afd.ops import backend

WORST = sys.float_info.max  # the error of what cannot be compared: JSON has no infinity


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
    name = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    results: dict[str, dict[str, Any]] = {}
    alive = True
    for case in cases():
        results[case.name] = verdict(case, given.device)
        write(given.out, {"device": name, "cases": results, "finished": False})
        if not results[case.name]["ok"]:
            print(f"{case.name}: {results[case.name]['words']}", flush=True)
            alive = given.device == "cpu" or context_lives()
        if not alive:
            print("smoke: the CUDA context is lost; the cases that were left have not run", flush=True)
            break
    write(given.out, {"device": name, "cases": results, "finished": alive})
    failed = sum(not result["ok"] for result in results.values())
    print(f"smoke: {len(results)} cases, {failed} failed, {time.monotonic() - began:.1f} s", flush=True)
    return 1 if failed else 0


def verdict(case: Case, device: str) -> dict[str, Any]:
    """Whether both sides agree; an exception is a failure, too."""
    try:
        error = apart(*both(case, device), bit_for_bit=case.tolerance == EXACT)
        words = f"{'bytes that differ:' if case.tolerance == EXACT else 'off by'} {error:.3g}"
    except Exception as problem:
        error, words = WORST, f"{type(problem).__name__}: {problem}".splitlines()[0]
    return {"ok": error <= case.tolerance, "error": error, "tolerance": case.tolerance, "words": words}


def both(case: Case, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """The results of the kernels on the device, and of what they are held to."""
    aside = device == "cuda" and case.batch.layout == "side stream"
    with backend.use("native"), torch.cuda.stream(torch.cuda.Stream()) if aside else nullcontext():
        got = case.op(replace(case.batch, device=device))
    if device == "cuda":
        torch.cuda.synchronize()  # what went wrong shows here, in its own case
    with backend.use("native" if device == "cuda" else "reference"):
        return got, case.op(case.batch)


def apart(got: list[Tensor], want: list[Tensor], *, bit_for_bit: bool) -> float:
    """How many bytes differ; or the largest difference, as a share of the largest value or of 1."""
    worst = 0.0
    for a, b in zip((tensor.cpu() for tensor in got), want, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise ValueError(f"{list(a.shape)} {a.dtype} came out, not {list(b.shape)} {b.dtype}")
        if bit_for_bit:
            worst += (a.flatten().view(torch.uint8) != b.flatten().view(torch.uint8)).sum().item()
        elif b.numel():
            share = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1)
            worst = max(worst, share.nan_to_num(nan=WORST, posinf=WORST).item())
    return worst


def context_lives() -> bool:
    """Whether this process can still use the GPU after an error on it."""
    try:
        torch.zeros(1, device="cuda").add_(1).item()
    except RuntimeError:
        return False
    return True


def write(path: Path, told: dict[str, Any]) -> None:
    """All at once: whoever reads meanwhile finds the old file or the new one."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(told, indent=1, allow_nan=False))
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
