"""What goes wrong between a data file and a tensor."""

from __future__ import annotations

from afd.errors import AfdError


class DataError(AfdError, OSError):
    """A data file is missing, cannot be fetched, or does not hold what its format promises."""
