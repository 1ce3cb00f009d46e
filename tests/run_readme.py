"""Runs what README prints, in order, as a new user would: commands and Python, in an empty folder. CI calls it.

What takes long is run with options that shorten it (`SHORTER`), or not at all, for a reason that is shown (`NOT_RUN`).
MNIST and CIFAR-10 are small files of noise, in the cache folder that a download would have filled.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n+)?```(?P<kind>sh|python)\n(?P<text>.*?)```", re.DOTALL)
QUICK = "--limit 60 --epochs 1 --width 2 --attack-steps 1 --eval-steps 1 --batch-size 32"
SHORTER = (  # added to a command that begins so
    ("make demo", "DEMO=--quick"),
    ("make test", "TESTS=tests/test_files.py"),
    ("afd train --resume auto", "--limit 60 --width 2 --attack-steps 1 --eval-steps 1 --batch-size 32"),
    ("afd train --config", "--epochs 1"),
    ("afd train natural", "--limit 60 --epochs 1 --width 2 --batch-size 32"),
    ("afd train", QUICK),
    ("torchrun", QUICK),
    ("afd compare --methods", "--images 10 --limit 60 --width 2 --attack-steps 1 --eval-steps 1 --batch-size 32"),
    ("afd evaluate", "--images 10"),
    ("afd bench attacks --attack apgd", "--batch 8 --steps 6 --repeats 1"),
    ("afd bench attacks", "--batch 8 --steps 1 --repeats 1"),
    ("afd bench agreement", "--images 20 --steps 1"),
    ("afd bench autoattack", "--images 10 --repeats 1 --parts apgd-ce --eps 0.05"),
)
NOT_RUN = (
    ("make bench", "it measures for minutes, with packages that nothing else needs"),
    ("make gpu", "it needs nvcc, or a GPU"),
)
INSTEAD = (
    ("epochs=20", "epochs=2"),
    ("--epochs 310", "--epochs 2"),
    ("--budget 5m", "--epochs 1"),
)  # of what is printed


def main() -> int:
    """Runs everything; returns 0 if all of it went well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    readme = parser.parse_args().readme
    with tempfile.TemporaryDirectory(prefix="afd-readme-") as temporary:
        cache, empty = Path(temporary) / "cache", Path(temporary) / "empty"
        noise(cache / "afd")
        empty.mkdir()
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
        failed = [step for step in steps(readme.read_text()) if not carried_out(*step, empty, environment)]
    for kind, text, _ in failed:
        print(f"FAILED ({kind}): {text}")
    return bool(failed)


def steps(readme: str) -> list[tuple[str, str, str | None]]:
    """What README prints: (kind, text, why it is not run)."""
    found: list[tuple[str, str, str | None]] = []
    for block in BLOCK.finditer(readme):
        if block["kind"] == "python":
            found.append(("python", block["text"], block["reason"]))
            continue
        for line in block["text"].replace("\\\n", " ").splitlines():
            command = re.sub(r"\s\s+#.*", "", line).strip()
            if command:
                why = next((reason for start, reason in NOT_RUN if command.startswith(start)), block["reason"])
                found.append(("sh", command, why))
    return found


def carried_out(kind: str, text: str, reason: str | None, empty: Path, environment: dict[str, str]) -> bool:
    """Whether a step went well; one that changes the environment changes it for those after it."""
    if reason is not None:
        print(f"not run, as {reason}: {text.splitlines()[0]}", flush=True)
        return True
    started = time.perf_counter()
    for long, short in INSTEAD:
        text = text.replace(long, short)
    if kind == "python":
        ran = subprocess.run(["python", "-c", text], cwd=empty, env=environment, check=False)
        shown = f"the Python example, with {INSTEAD[0][1]}"
    else:
        more = next((more for start, more in SHORTER if text.startswith(start)), "")
        helps = text.endswith("--help")
        shown = f"{text} {more}".strip() if not helps else text
        # make, and what is in .venv, belong to the checkout
        where = ROOT if text.startswith(("make", ".")) else empty
        script = f"set -e; {shown}; env -0 >&3"
        read, write = os.pipe()
        ran = subprocess.run(
            ["bash", "-c", f"exec 3>&{write}; {script}"], cwd=where, env=environment, pass_fds=[write], check=False,
            stdout=subprocess.DEVNULL if helps else None,
        )  # fmt: skip
        os.close(write)
        with os.fdopen(read) as told:
            pairs = dict(line.partition("=")[::2] for line in told.read().split("\0") if line)
        if ran.returncode == 0:
            environment.clear()
            environment.update(pairs)
    status = "ok" if ran.returncode == 0 else f"exit status {ran.returncode}"
    print(f"[{status}, {time.perf_counter() - started:.1f} s] {shown}\n", flush=True)
    return ran.returncode == 0


def noise(folder: Path) -> None:
    """Files in the layouts of MNIST and CIFAR-10, of random bytes."""
    draw = np.random.default_rng(0)
    mnist, cifar = folder / "mnist", folder / "cifar-10-batches-bin"
    for path in (mnist, cifar):
        path.mkdir(parents=True)
    for name, count in (("train", 600), ("t10k", 100)):
        images, labels = draw.integers(256, size=(count, 28, 28)), draw.integers(10, size=count)
        header = struct.pack(">4I", 0x803, count, 28, 28)
        (mnist / f"{name}-images-idx3-ubyte").write_bytes(header + images.astype(np.uint8).tobytes())
        (mnist / f"{name}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2I", 0x801, count) + labels.astype(np.uint8).tobytes()
        )
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        records = draw.integers(256, size=(10_000, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        (cifar / f"{name}.bin").write_bytes(records.tobytes())


if __name__ == "__main__":
    print(shlex.join(sys.argv), flush=True)
    sys.exit(main())
