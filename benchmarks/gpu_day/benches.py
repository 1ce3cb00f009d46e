"""Stages 3 to 5: ``afd bench``, as data. Where there is no GPU the sizes are such that a small CPU ends soon."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from gpu_day import readers
from gpu_day.child import Command, Exit
from gpu_day.setting import Setting
from gpu_day.steps import AFD, Box, Findings, Stage, Step

PEERS = "eager,eager-tf32,eager-bf16,compile,torchattacks,foolbox,pyautoattack"


@dataclass(frozen=True)
class Bench:
    """One call of ``afd bench``, whose --device and --out are added.

    Attributes:
        name: of the step and its JSON file.
        words: what is measured.
        share: of the stage's time.
        modules: what it cannot do without.
    """

    name: str
    words: str
    share: float = 1.0
    modules: tuple[str, ...] = field(default=())


def _attacks(model: str, batch: int, rounds: int, attacks: str = "pgd,apgd") -> str:
    return (
        f"attacks --model {model} --batch {batch} --attack {attacks} --norm Linf --steps 10 --against {PEERS}"
        f" --rounds {rounds}"
    )


ON_GPU = {
    3: (
        Bench("kernels-cifar", "kernels --sizes cifar --rounds 100", share=2),
        Bench("kernels-imagenet", "kernels --sizes imagenet --rounds 60", share=2),
        Bench("discriminator", "discriminator --rounds 200"),
    ),
    4: (
        Bench("attacks-resnet18-128", _attacks("resnet18", 128, rounds=15), share=3),
        Bench("attacks-resnet50-64", _attacks("torchvision.models:resnet50", 64, rounds=7, attacks="pgd")
              + " --shape 3 224 224", share=3, modules=("torchvision",)),
        Bench("attacks-resnet18-1024", _attacks("resnet18", 1024, rounds=5), share=4),
        Bench("attacks-resnet18-256", _attacks("resnet18", 256, rounds=10), share=3),
    ),
    5: (
        Bench("round-resnet18", "round --case resnet18 --batch 128 --steps 10 --rounds 15", modules=("pyautoattack",)),
        Bench("round-small", "round --case small --batch 128 --steps 40 --rounds 15", modules=("pyautoattack",)),
    ),
}  # fmt: skip
ON_CPU = {
    3: (
        Bench("kernels-cifar", "kernels --sizes cifar --ops pgd_step,spectral_norm --rounds 2", share=2),
        Bench("discriminator", "discriminator --rounds 2"),
    ),
    4: (
        Bench("attacks-lenet-8", "attacks --model lenet --batch 8 --attack pgd,apgd --norm Linf --steps 2"
              " --against eager --rounds 1"),
    ),
    5: (Bench("round-small", "round --case small --batch 8 --steps 2 --rounds 1", modules=("pyautoattack",)),),
}  # fmt: skip


def stages() -> tuple[Stage, ...]:
    """Kernels, attacks, rounds."""
    return (
        Stage(3, "kernels", "kernels and discriminator beside floor, eager and torch.compile", 3, partial(steps, 3)),
        Stage(4, "attacks", "attack throughput beside other libraries, eager and torch.compile", 6, partial(steps, 4)),
        Stage(5, "rounds", "AFD rounds beside the released code's", 2, partial(steps, 5)),
    )


def steps(number: int, setting: Setting) -> Sequence[Step]:
    """A step a benchmark."""
    return [
        Step(bench.name, partial(commands, bench), bench.share, modules=(*AFD, *bench.modules), read=read)
        for bench in (ON_GPU if setting.machine.gpu else ON_CPU)[number]
    ]


def commands(bench: Bench, box: Box) -> list[Command]:
    """The benchmark with its device and file."""
    ends = ("--device", box.setting.device, "--out", str(box.folder / f"{bench.name}.json"))
    return [Command(bench.name, (sys.executable, "-m", "afd", "bench", *bench.words.split(), *ends))]


def read(box: Box, exits: Sequence[Exit]) -> Findings:
    """The median of everything that was timed; the benchmark's own table, in the log, says more."""
    found: dict[str, str] = {}
    for exit_ in exits:
        medians = readers.medians(readers.read_json(box.folder / f"{exit_.command.name}.json"))
        if exit_.well and not any(medians.values()):
            return Findings(problems=[f"{exit_.command.name} ended well, but its JSON file holds no times"])
        for case, times in medians.items():
            found[case] = ", ".join(f"{who} {seconds * 1e3:.4g} ms" for who, seconds in times.items())
    return Findings(found)
