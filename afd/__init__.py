"""Adversarial Feature Desensitization (Bashivan et al., NeurIPS 2021): fused attacks and the three-player game.

Parts are imported when they are asked for: importing the package alone imports no torch.
"""

from __future__ import annotations

import importlib
import sys
import warnings

from afd._version import __version__

TYPE_CHECKING = False  # as typing's, which takes milliseconds to import, in which Ctrl-C is not yet ours
if TYPE_CHECKING:
    from typing import Any

    from afd import attacks, data, errors, evaluation, methods, nn, ops, training
    from afd.training import Trainer

__all__ = [
    "Trainer", "__version__", "attacks", "data", "errors", "evaluation", "methods", "nn", "ops", "training",
]  # fmt: skip

# the command says it in its own words, and only when it has taken Ctrl-C
_command = "".join(getattr(sys, "argv", [])[:1])
if _command != "-m" and not _command.endswith("/afd"):
    from afd import deprecated as deprecated  # so that modules are found by earlier names
    from afd.installation import namesake

    if (_found := namesake()) is not None:
        warnings.warn(_found.told, UserWarning, stacklevel=2)


if not TYPE_CHECKING:  # which would take it for an answer to every name

    def __getattr__(name: str) -> Any:
        """The part of a name."""
        if name == "Trainer":
            from afd.training import Trainer

            return Trainer
        if name not in __all__:
            raise AttributeError(f"module 'afd' has no attribute {name!r}")
        return importlib.import_module(f"afd.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
