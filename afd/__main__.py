"""``python -m afd`` is the ``afd`` command."""

import sys

from afd.cli import main

sys.exit(main())
