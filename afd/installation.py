"""What is installed beside torch and numpy: packages of the extras, and another package of our name in the way."""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from afd.errors import AfdError, InputError
from afd.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# --- Extras ---------------------------------------------------------------------------------------------------------


DISTRIBUTION = "afd-torch"  # what pip calls this library
EXTRAS = {  # modules, by the extra that brings them
    "train": (
        "tyro",
        "rich",
        "matplotlib",
        "tensorboard",
        "sklearn",
        "pooch",
        "tomli_w",
        "jinja2",
        "PIL",
        "simplejpeg",
    ),
    "evaluate": ("foolbox", "pyautoattack"),
    "models": ("timm", "torchvision", "transformers", "safetensors"),
}  # fmt: skip
# what pip calls a module, where that is not its name
PACKAGES = {"sklearn": "scikit-learn", "tomli_w": "tomli-w", "PIL": "pillow"}
EXTRA_OF = {module: extra for extra, modules in EXTRAS.items() for module in modules}


class ExtraMissingError(AfdError, ImportError):
    """A package of an extra is not installed, or fails; the message says how to add it."""


def installed(module: str) -> bool:
    """Whether a module can be imported."""
    return importlib.util.find_spec(module) is not None


def require(module: str, purpose: str) -> None:
    """Imports a module of an extra, so that what is missing is said before anything starts.

    Args:
        module: of one of `EXTRAS`.
        purpose: what needs it, to begin the sentence with.

    Raises:
        ExtraMissingError: it is not installed, or cannot be imported.
    """
    if not installed(module):
        raise ExtraMissingError(_missing(module, purpose))
    with needed_by(purpose, module):
        importlib.import_module(module)


@contextmanager
def needed_by(purpose: str, module: str | None = None) -> Iterator[None]:
    """Around imports from packages of extras: names the one that is missing, or that fails.

    Args:
        purpose: what needs it, to begin the sentence with.
        module: what is imported, if the imports alone do not say.

    Raises:
        ExtraMissingError: an import has failed.
    """
    try:
        yield
    except Exception as error:  # whatever a package raises where it does not fit what else is installed
        found = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ImportError) and found in EXTRA_OF and not installed(found):
            raise ExtraMissingError(_missing(found, purpose)) from error
        named = module or found or "a package"
        raise ExtraMissingError(
            f"{purpose} needs {named}, which is installed but fails with {type(error).__name__}: {error}"
        ) from error


def how_to_add(module: str, package: str | None = None) -> str:
    """The command that installs a module: with the extra that has it, or alone, as what pip calls its package."""
    if module in EXTRA_OF:
        return f"pip install '{DISTRIBUTION}[{EXTRA_OF[module]}]'"
    return f"pip install {package or module}"


def _missing(module: str, purpose: str) -> str:
    package = PACKAGES.get(module, module)
    return f"{purpose} needs {package}, which is not installed; add it with: {how_to_add(module)}"


# --- Pictures -------------------------------------------------------------------------------------------------------


def check_format(path: Path | str, formats: dict[str, str]) -> str:
    """The format of a picture of that name, PNG for a name without an ending.

    Raises:
        InputError: the ending is of no format that can be drawn.
    """
    ending = Path(path).suffix[1:].lower() or "png"
    if ending not in formats:
        raise InputError(f"the picture is to be {str(path)!r}; its name may end in .{', .'.join(sorted(formats))}")
    return ending


def save_picture(figure: Figure, path: Path | str) -> None:
    """Writes a figure in the format that its name ends in.

    Raises:
        InputError: it ends in none.
        FileError: the file cannot be written.
    """
    ending, drawn = check_format(path, figure.canvas.get_supported_filetypes()), io.BytesIO()
    figure.savefig(drawn, format=ending)
    write_whole(path, drawn.getvalue())


# --- Our name ---------------------------------------------------------------------------------------------------------


OURS = "Adversarial Feature Desensitization"  # so the summary of this library begins, which once was called afd itself


class NamesakeError(AfdError):
    """Another package of our name has put its files among ours."""


class Namesake(NamedTuple):
    """A distribution called afd that is not this one.

    Attributes:
        version: of it.
        summary: what it says of itself.
        mixed: whether its files lie in the very folder of this package.
    """

    version: str
    summary: str
    mixed: bool

    @property
    def told(self) -> str:
        """What it is and what to do, in one line."""
        what = f"another package is installed as afd: afd {self.version} ({self.summary}), which is not this library"
        if self.mixed:
            return (
                f"{what} and lies in one folder with it, so that neither works; run `pip uninstall afd`, then "
                "`pip install --force-reinstall --no-deps afd-torch` (or the path that you installed this one from)"
            )
        return f"{what}; `import afd` and the command afd may be that one's until you run `pip uninstall afd`"


def namesake() -> Namesake | None:
    """The stranger that is installed under our name, if there is one."""
    here = Path(__file__).resolve().parent
    for found in metadata.distributions(name="afd"):
        told = found.metadata
        summary = " ".join((told["Summary"] or "no summary").split())
        if not summary.startswith(OURS):
            theirs = Path(str(found.locate_file("afd"))).resolve()
            return Namesake(str(told["Version"] or "of no version"), summary, theirs == here)
    return None


def apart() -> None:
    """Says that there is a namesake, which may be called instead of us.

    Raises:
        NamesakeError: its files lie among ours, so that nothing can be relied on.
    """
    found = namesake()
    if found is None:
        return
    if found.mixed:
        raise NamesakeError(found.told)
    print(f"afd: warning: {found.told}", file=sys.stderr)
