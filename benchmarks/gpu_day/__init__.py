"""One command for a day on a GPU: ``make gpu``, with nothing fetched from a network.

Six stages, each in its own time box: build, check, time the kernels, time the attacks, time AFD rounds, train. A stage
is data, a list of steps; a step is a few commands, each run as a child with its own log. Whatever a step tells is
written when the step ends, so that a day that is cut off leaves all that it did.

Only the standard library is imported here (`pace`, which runs as a child, imports afd): this has to run on a machine as
it is found.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (the machine's own Python, and none that was installed for this)
    raise SystemExit(f"make gpu: Python is {sys.version.split()[0]}; it must be 3.11 or newer (name one with PYTHON=)")
