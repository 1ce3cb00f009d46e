"""State of spectral-normalised layers in the three forms there are.

| form | weight | vectors |
|---|---|---|
| "afd" | ``weight`` | ``u``, ``v`` |
| "parametrized" (`torch.nn.utils.parametrizations.spectral_norm`) | ``parametrizations.weight.original`` | \
``parametrizations.weight.0._u``, ``._v`` |
| "hooked" (`torch.nn.utils.spectral_norm`, the older one) | ``weight_orig`` | ``weight_u``, ``weight_v`` |
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, TypeVar

from afd.errors import one_of

T = TypeVar("T")

FORMS: dict[str, tuple[str, str, str]] = {
    "afd": ("weight", "u", "v"),
    "parametrized": (
        "parametrizations.weight.original",
        "parametrizations.weight.0._u",
        "parametrizations.weight.0._v",
    ),
    "hooked": ("weight_orig", "weight_u", "weight_v"),
}


def convert_spectral_state(state: Mapping[str, T], form: str) -> dict[str, T]:
    """A state dictionary with every spectral-normalised layer in it, whichever form it has, in the form asked for.

    Keys of other layers, biases among them, stay as they are, and so does the order.

    Args:
        state: of a module, at any depth.
        form: "afd", "parametrized" or "hooked".

    Raises:
        InputError: unknown form.
    """
    one_of("form", form, FORMS)
    renamed = {}
    for names in FORMS.values():
        for prefix in _layers(state, names):
            renamed.update({prefix + old: prefix + new for old, new in zip(names, FORMS[form], strict=True)})
    return {renamed.get(key, key): value for key, value in state.items()}


def _layers(state: Mapping[str, Any], names: tuple[str, str, str]) -> list[str]:
    """Prefixes under which all three names are found."""
    prefixes = (key.removesuffix(names[0]) for key in state if f".{key}".endswith(f".{names[0]}"))
    return [prefix for prefix in prefixes if all(prefix + name in state for name in names)]


def read_older(_module: Any, state: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """Renames the older forms of one layer's state in place, before the layer reads it."""
    for names in FORMS.values():
        if all(prefix + name in state for name in names):
            for old, new in zip(names, FORMS["afd"], strict=True):
                state[prefix + new] = state.pop(prefix + old)
