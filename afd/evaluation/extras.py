"""Libraries that some attacks come from. None is a dependency; a missing one is named with the line that adds it."""

from __future__ import annotations

import importlib
import importlib.util

from afd.errors import AfdError


class ExtraMissingError(AfdError, ImportError):
    """A library of the `evaluate` extra is not installed; the message says how to add it."""


def installed(library: str) -> bool:
    """Whether a library can be imported."""
    return importlib.util.find_spec(library) is not None


def require(library: str, purpose: str) -> None:
    """Raises ExtraMissingError unless the library can be imported.

    Args:
        library: its module, which is also what pip calls it.
        purpose: what needs it, to begin the sentence with.
    """
    if not installed(library):
        raise ExtraMissingError(
            f"{purpose} needs {library}, which is not installed; add it with: pip install 'afd[evaluate]'"
        )
    try:
        importlib.import_module(library)
    except Exception as error:  # whatever a library raises where it does not fit what else is installed
        raise ExtraMissingError(
            f"{purpose} needs {library}, which is installed but fails with {type(error).__name__}: {error}"
        ) from error
