"""The commands ``afd train | evaluate | bench | curves | info`` (or ``python -m afd``).

A mistake ends in one line and exit status 2.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from afd import info as information
from afd.attacks import CaptureWarning, ModelWarning
from afd.bench.agreement import AgreementBench
from afd.bench.attacks import AttackBench
from afd.bench.discriminator import DiscriminatorBench
from afd.bench.kernels import KernelBench
from afd.bench.program import run as run_benchmark
from afd.bench.rounds import RoundBench
from afd.config import NUMBER, TrainConfig
from afd.errors import AfdError
from afd.evaluate import EvaluateConfig
from afd.evaluate import run as run_evaluation
from afd.training import StoppedError
from afd.training import train as run_training
from afd.training.curves import named, plot_curves
from afd.training.distributed import leave


def train(config: Annotated[TrainConfig, tyro.conf.arg(name="")]) -> None:
    """Train a classifier and measure its best checkpoint.

    Args:
        config: the run.
    """
    run_training(config)
    leave()


def evaluate(config: Annotated[EvaluateConfig, tyro.conf.arg(name="")]) -> None:
    """Attack a trained classifier, look for self-deception, and write a report.

    Args:
        config: the evaluation.
    """
    run_evaluation(config)


def curves(runs: tyro.conf.Positional[tuple[str, ...]], out: Path = Path("curves.png")) -> None:
    """Draw the learning curves of runs in one picture.

    Args:
        runs: folders that `afd train` has written, as FOLDER or NAME=FOLDER.
        out: PNG to write.
    """
    plot_curves(out, named(runs))
    print(f"written to {out}")


Work = (
    Annotated[AttackBench, tyro.conf.subcommand("attacks")]
    | Annotated[KernelBench, tyro.conf.subcommand("kernels")]
    | Annotated[RoundBench, tyro.conf.subcommand("round")]
    | Annotated[DiscriminatorBench, tyro.conf.subcommand("discriminator")]
    | Annotated[AgreementBench, tyro.conf.subcommand("agreement")]
)


def bench(work: Annotated[Work, tyro.conf.arg(name="")]) -> None:
    """Measure attacks, kernels and training rounds beside what else does the same work.

    Args:
        work: the benchmark.
    """
    run_benchmark(work, Console())


def info() -> None:
    """Show versions, compiled kernels, and which backend serves CPU and CUDA tensors."""
    print("\n".join(information.lines()))


def in_a_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as text: afd's own in words alone, for here no line of the user's code is behind it."""
    if category in {CaptureWarning, ModelWarning}:
        return f"afd: warning: {message}\n"
    return STANDARD_FORMAT(message, category, filename, lineno, line)


STANDARD_FORMAT = warnings.formatwarning
NUMBERS = tyro.constructors.ConstructorRegistry()


@NUMBERS.primitive_rule
def number(kind: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[float] | None:
    """Every option that is a number may be written as a fraction."""
    return NUMBER if kind.type is float else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    before, warnings.formatwarning = warnings.formatwarning, in_a_line
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"train": train, "evaluate": evaluate, "bench": bench, "curves": curves, "info": info},
            prog="afd",
            description="Adversarial Feature Desensitization: train, evaluate, measure speed, see what is built.",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            registry=NUMBERS,
        )
    except StoppedError as stopped:
        print(f"afd: {stopped}", file=sys.stderr)
        return stopped.status
    except AfdError as error:
        print(f"afd: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("afd: interrupted; what was finished (epochs, evaluated batches) is kept", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = before
    return 0
