"""A benchmark without the parser of the command line: ``python -m afd.bench kernels sizes=cifar repeats=9``.

Takes Ctrl-C first, then imports what it needs.
"""

from __future__ import annotations

from afd import process


def asked() -> process.Work:
    """What the arguments of this process ask for."""
    import sys
    from functools import partial

    from afd import installation
    from afd.bench.attacks import AttackBench
    from afd.bench.base import built, run
    from afd.bench.kernels import DiscriminatorBench, KernelBench
    from afd.bench.methods import MethodsBench
    from afd.deprecated import bench_words

    with installation.needed_by("afd.bench"):
        from rich.console import Console

    kinds = (AttackBench, DiscriminatorBench, KernelBench, MethodsBench)
    return partial(run, built(kinds, bench_words(sys.argv[1:])), Console())


if __name__ == "__main__":
    process.run(asked, "afd.bench")
