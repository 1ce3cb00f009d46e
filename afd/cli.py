"""The commands ``afd train | plan | evaluate | compare | bench | curves | info`` (or ``python -m afd``).

A mistake ends in one line and exit status 2. Each command imports what it needs, when it is asked for.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

from afd import installation, process
from afd._version import __version__

if TYPE_CHECKING:
    from afd.bench.base import Benchmark
    from afd.process import Work


def train(words: Sequence[str]) -> Work:
    """Train a classifier and measure its best checkpoint."""
    from afd.options import train_config

    config = train_config(words, train.__doc__)
    for warning in config.settled().warnings():
        print(f"afd: warning: {warning}", file=sys.stderr)
    from afd.experiments.seeds import train_seeds
    from afd.experiments.train import train as run
    from afd.processes import leave

    installation.require("tensorboard", "afd train")
    if config.data.name == "digits":
        installation.require("sklearn", "the data set digits")

    def work() -> None:
        if config.seeds:
            train_seeds(config)
        else:
            run(config)
        leave()

    return work


def plan(words: Sequence[str]) -> Work:
    """Say what a run will cost, from a minute's trial of it that leaves nothing behind but plan.json in --out."""
    from afd.experiments.plan import SECONDS
    from afd.experiments.plan import plan as run
    from afd.options import train_config

    words, seconds = _trial_of(words, SECONDS)
    config = train_config(words, f"{plan.__doc__} --trial SECONDS is how long that takes, about.", "plan")
    for warning in config.settled().warnings():
        print(f"afd: warning: {warning}", file=sys.stderr)
    if config.data.name == "digits":
        installation.require("sklearn", "the data set digits")

    def work() -> None:
        run(config, seconds)

    return work


def _trial_of(words: Sequence[str], default: float) -> tuple[list[str], float]:
    """The words but for --trial, and the seconds that it says.

    Raises:
        UsageError: they are none.
    """
    from afd.errors import fraction
    from afd.options import UsageError

    left, found = list(words), default
    for place, word in reversed(list(enumerate(words))):
        option, equals, value = word.partition("=")
        if option != "--trial":
            continue
        told = value if equals else "".join(words[place + 1 : place + 2])
        try:
            found = fraction(told)
        except ValueError:
            raise UsageError(f"trial is {told!r}; it must be a number of seconds, such as 60") from None
        del left[place : place + (1 if equals else 2)]
    return left, found


def evaluate(words: Sequence[str]) -> Work:
    """Attack a trained classifier, look for self-deception, and write a report."""
    from afd.deprecated import compared_words

    if (moved := compared_words(words)) is not None:
        return compare(moved)
    from afd.evaluation.command import EvaluateConfig, run
    from afd.options import parsed

    return partial(run, parsed(EvaluateConfig, "evaluate", words, evaluate.__doc__))


def compare(words: Sequence[str]) -> Work:
    """Train several methods at one cost, measure them alike, and put them into one table."""
    from afd.comparing import comparison_asked

    return comparison_asked(words, compare.__doc__)


def bench(words: Sequence[str]) -> Work:
    """Measure attacks, kernels and training steps beside what else does the same work."""
    with installation.needed_by("afd bench"):
        from rich.console import Console

    from afd.bench.base import run
    from afd.deprecated import bench_words
    from afd.options import parsed

    return partial(run, parsed(benchmarks(), "bench", bench_words(words), bench.__doc__), Console())


def curves(words: Sequence[str]) -> Work:
    """Draw the learning curves of runs in one picture."""
    from afd.experiments.display import named, plot_curves
    from afd.files import check_file_target
    from afd.options import parsed, tyro

    def drawn(runs: tyro.conf.Positional[tuple[str, ...]], out: Path = Path("curves.png")) -> Any:
        """Draw the learning curves of runs in one picture.

        Args:
            runs: folders that `afd train` has written, as FOLDER or NAME=FOLDER.
            out: PNG to write.
        """

        def work() -> None:
            check_file_target("out", out)
            plot_curves(out, named(runs))
            print(f"written to {out}")

        return work

    drawn.__annotations__ = {"runs": tyro.conf.Positional[tuple[str, ...]], "out": Path}
    made: Work = parsed(drawn, "curves", words, curves.__doc__)
    return made


def info(words: Sequence[str]) -> Work:
    """Show versions, compiled kernels, and which backend serves CPU and CUDA tensors."""
    from afd.ops import backend
    from afd.options import parsed

    def shown() -> Any:
        """Show versions, compiled kernels, and which backend serves CPU and CUDA tensors."""
        return lambda: print("\n".join(backend.lines()))

    made: Work = parsed(shown, "info", words, info.__doc__)
    return made


NAME = re.compile(r"^[a-z]+(_[a-z]+)+(?= is )")  # of an argument, at the beginning of an error
COMMANDS = {
    "train": train,
    "plan": plan,
    "evaluate": evaluate,
    "compare": compare,
    "bench": bench,
    "curves": curves,
    "info": info,
}


def benchmarks() -> Any:
    """All benchmarks as one type for the parser."""
    from afd.bench.attacks import AgreementBench, AttackBench
    from afd.bench.autoattack import AutoAttackBench
    from afd.bench.kernels import DiscriminatorBench, KernelBench
    from afd.bench.methods import MethodsBench
    from afd.options import tyro

    kinds: tuple[type[Benchmark], ...] = (
        AttackBench,
        KernelBench,
        MethodsBench,
        DiscriminatorBench,
        AgreementBench,
        AutoAttackBench,
    )
    return Union[tuple(Annotated[kind, tyro.conf.subcommand(kind.name)] for kind in kinds)]  # noqa: UP007


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command in somebody's process, whose signals are left alone; returns the exit status.

    Args:
        arguments: of the command line; those of this process by default.
    """
    return process.carry_out(partial(asked, sys.argv[1:] if arguments is None else arguments), "afd")


def asked(words: Sequence[str]) -> Work:
    """The work that words ask for, with all that it needs imported.

    Raises:
        AfdError: they ask for none that can be done.
        SystemExit: they ask for help, which was shown.
    """
    if list(words) == ["--version"]:
        return partial(print, f"afd {__version__}")
    if not words or words[0] not in COMMANDS:
        return overview(words)
    _refuse_empty(words)
    with spelled():
        return _spelling(COMMANDS[words[0]](words[1:]))


def _refuse_empty(words: Sequence[str]) -> None:
    """Raises UsageError for a word that says nothing, as an unset variable of a shell leaves it."""
    from afd.options import UsageError

    for before, word in pairwise(words):
        option, equals, value = word.partition("=")
        if word and not (equals and not value and option.startswith("--")):
            continue
        name = (option if word else before).removeprefix("--") if (word or before.startswith("--")) else "a word"
        raise UsageError(f"{name} is ''; it must not be empty (a variable that is not set?)")


@contextmanager
def spelled() -> Iterator[None]:
    """Names of arguments in errors are spelled as options are."""
    from afd.errors import InputError

    try:
        yield
    except InputError as error:
        error.args = (NAME.sub(lambda found: found[0].replace("_", "-"), str(error)),)
        raise


def _spelling(work: Work) -> Work:
    def spelt() -> None:
        with spelled():
            work()

    return spelt


def overview(words: Sequence[str]) -> Work:
    """Shows the commands, or says that there is no such one."""
    from afd.options import UsageError, show_commands

    if not words:
        raise UsageError(f"the command is missing; allowed are {', '.join(COMMANDS)} (afd --help says more)")
    described = f"Adversarial Feature Desensitization {__version__}: train, evaluate, measure speed, see what is built."
    show_commands(described, {name: str(command.__doc__) for name, command in COMMANDS.items()}, words)
    raise UsageError(f"the command is {words[0]!r}; allowed are {', '.join(COMMANDS)}")
