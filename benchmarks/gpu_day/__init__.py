"""A day on a GPU, with nothing fetched: ``make gpu``, or ``PYTHONPATH=benchmarks python3 -m gpu_day``.

Steps (`plan`) run one after the other, each a child in its time box (`run`), and what is known of them is in
results.json at once (`results`). ``gpu_pack.py`` makes what such a machine lacks (`module`). No package is needed.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (the machine's own Python, and none that was installed for this)
    raise SystemExit(f"make gpu: Python is {sys.version.split()[0]}; it must be 3.11 or newer (name one with PYTHON=)")


class DayError(Exception):
    """The day cannot begin or go on; a line a reason."""
