"""What loaders keep of their own from batch to batch, so that a pass can be repeated: also in another process.

The global generators are not all that a loader draws from. It may have generators of its own (``generator=``, a
sampler's, a transform's, one that lies in a global of the user's script), may count its passes, or may say its state by
``state_dict()``. `capture` finds all of that wherever it lies within a loader, as plain content of a checkpoint.

Not found, and thus not saved: what lies in another process, in C code, or in the clock. `same_again` notices that.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from afd.data.items import images_and_labels

LONGEST = 100  # of a list or dict that is looked into; what is longer is data
MOST = 10_000  # objects that are looked at
PARTS = ("dataset", "sampler", "batch_sampler")  # of a loader, whatever their class
NUMBERS = (bool, int, float)
LIBRARIES = (
    "torch",
    "numpy",
    "random",
    "builtins",
    "collections",
    "functools",
)  # whose code draws from what it is given
_NOTHING = type("Nothing", (), {})()
LOADERS = "loaders"  # where it lies beside the global generators


def capture(loaders: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The state of loaders, by the names given to them.

    Args:
        loaders: by name.
        before: what `numbers` said when they were new; only what has changed since is kept.
    """
    changed = {path: value for path, value in numbers(loaders).items() if not _same((before or {}).get(path), value)}
    return {
        "generators": {path: _state_of(one) for path, one in _walk(loaders) if _is_generator(one)},
        "numbers": changed,
        "own": {name: one.state_dict() for name, one in loaders.items() if _says_its_state(one)},
    }


def restore(loaders: Mapping[str, Any], state: Mapping[str, Any], own: bool = True) -> list[str]:
    """Puts loaders where `capture` found them; returns the names of what is not there any more.

    Args:
        loaders: by name.
        state: from `capture`.
        own: also what they said by ``state_dict()``, which moves them to another batch.
    """
    missing = []
    for name, kept in state["own"].items() if own else ():
        if _says_its_state(loaders[name]):
            loaders[name].load_state_dict(kept)
        else:
            missing.append(f"{name}.state_dict()")
    reached = dict(_walk(loaders))
    for path, value in state["numbers"].items():
        holder, _, name = path.rpartition(".")
        if holder in reached:
            vars(reached[holder])[name] = _like(vars(reached[holder]).get(name), value)
        else:
            missing.append(path)
    for path, kept in state["generators"].items():
        holder, _, name = path.rpartition(".")
        if _is_generator(reached.get(path)):
            _put(reached[path], kept)
        elif vars(reached.get(holder, _NOTHING)).get(name, _NOTHING) is None:
            vars(reached[holder])[name] = _made(kept)  # a generator that is made when it is first needed
        else:
            missing.append(path)
    return missing


def numbers(loaders: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers in the attributes of loaders, samplers and data sets, and rows of numbers of the former two, by path."""
    found = {}
    for path, one in _parts(loaders):
        rows = not hasattr(one, "__getitem__")  # a data set's rows of numbers are data
        for name, value in vars(one).items():
            if isinstance(value, NUMBERS) or (rows and _is_row(value)):
                found[f"{path}.{name}"] = _plain(value)
    return found


def begin_anew(loaders: Mapping[str, Any]) -> None:
    """Ends workers that a DataLoader keeps from pass to pass (``persistent_workers``).

    What they have drawn since they began lies in another process, so only a pass that begins with new ones can be
    repeated.
    """
    for _, one in _walk(loaders):
        if isinstance(one, DataLoader) and one.persistent_workers:
            one._iterator = None


def same_again(loader: Any) -> bool:
    """Whether a loader's first batch comes a second time, when everything that `capture` finds is put back."""
    batches = []
    for _ in range(2):
        with untouched(loader):
            batches.append([part.clone() for item in islice(loader, 1) for part in images_and_labels(item)])
    return len(batches[0]) == len(batches[1]) and all(map(torch.equal, *batches))


def in_order(loader: Any) -> bool:
    """Whether a DataLoader's batches come in an order that does not depend on which worker is ready first."""
    loaders = [one for _, one in _walk({"": loader}) if isinstance(one, DataLoader)]
    return all(one.num_workers < 2 or getattr(one, "in_order", True) for one in loaders)


@contextmanager
def untouched(loader: Any) -> Iterator[None]:
    """Random generators, those of the loader's own included, and the loader's attributes are as before afterwards."""
    before = [(vars(one), dict(vars(one))) for _, one in _parts({"": loader})]
    values = [value for _, attributes in before for value in attributes.values()]
    rows = [(value, list(value)) for value in values if type(value) is list and _is_row(value)]
    own = loader.state_dict() if _says_its_state(loader) else None
    states = [(one, _state_of(one)) for _, one in _walk({"": loader}) if _is_generator(one)]
    generators = global_generators()
    try:
        yield
    finally:
        for here, attributes in before:
            here.clear()
            here.update(attributes)
        for row, content in rows:
            row[:] = content
        if own is not None:
            loader.load_state_dict(own)
        for one, kept in states:
            _put(one, kept)
        set_global_generators(generators)


# --- What lies within a loader --------------------------------------------------------------------------------------


def _walk(loaders: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every object within loaders that may hold a generator, nearest first, by the path of attributes to it."""
    waiting = deque(loaders.items())
    seen: dict[int, Any] = {}
    while waiting and len(seen) < MOST:
        path, one = waiting.popleft()
        if id(one) in seen or isinstance(one, Tensor | np.ndarray | str | bytes | type | ModuleType):
            continue
        if type(one).__module__.partition(".")[0] == "afd":
            continue
        seen[id(one)] = one
        if _is_generator(one) or isinstance(getattr(one, "__dict__", None), dict):
            yield path, one
        if not _is_generator(one):
            waiting.extend((f"{path}.{name}", child) for name, child in _within(one))


def _parts(loaders: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Loaders, and the samplers and data sets within them."""
    for path, one in _walk(loaders):
        named = path in loaders or path.rpartition(".")[2] in PARTS
        if (named or isinstance(one, DataLoader | Sampler | Dataset)) and not _is_generator(one):
            yield path, one


def _within(one: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(one, dict):
        return [] if dict.__len__(one) > LONGEST else list(dict.items(one))
    plain: Any = next((kind for kind in (list, tuple, set, deque) if isinstance(one, kind)), None)
    if plain is not None:  # by the kind's own methods: a subclass may serve batches by its __iter__
        return [] if plain.__len__(one) > LONGEST else enumerate(plain.__iter__(one))
    if isinstance(one, partial):
        return [("func", one.func), ("args", one.args), ("keywords", one.keywords)]
    if isinstance(one, MethodType):
        return [("self", one.__self__), ("function", one.__func__)]
    if isinstance(one, FunctionType):
        return [*_drawn_from(one), ("defaults", one.__defaults__), ("keywords", one.__kwdefaults__)]
    found = (
        [(name, child) for name, child in vars(one).items() if name != "_iterator"] if hasattr(one, "__dict__") else []
    )
    for kind in type(one).__mro__:
        if kind.__module__.partition(".")[0] not in LIBRARIES:
            for name, member in vars(kind).items():
                if isinstance(member, FunctionType):
                    found += [(f"{name}.{inner}", child) for inner, child in _drawn_from(member)]
                elif _is_generator(member):
                    found.append((name, member))
        found += [(name, getattr(one, name)) for name in _slots(kind) if hasattr(one, name)]
    return found


def _drawn_from(function: FunctionType) -> list[tuple[str, Any]]:
    """What a function has closed over, and generators in the globals that it names."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    closed = [(name, cell.cell_contents) for name, cell in cells if cell != type(cell)()]
    named = [(name, function.__globals__.get(name)) for name in _names(function.__code__)]
    return closed + [(name, one) for name, one in named if _is_generator(one)]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def _slots(kind: type) -> Iterable[str]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else slots


def _says_its_state(loader: Any) -> bool:
    return all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))


# --- Generators and numbers as plain content ------------------------------------------------------------------------


def _is_generator(one: Any) -> bool:
    kinds = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator, np.random.BitGenerator)
    return isinstance(one, kinds) and not isinstance(one, random.SystemRandom)


def _state_of(one: Any) -> dict[str, Any]:
    if isinstance(one, torch.Generator):
        return {"kind": "torch", "device": str(one.device), "state": one.get_state()}
    if isinstance(one, random.Random):
        return {"kind": "python", "state": one.getstate()}
    if isinstance(one, np.random.RandomState):
        return {"kind": "legacy", "state": _plain(one.get_state(legacy=False))}
    if isinstance(one, np.random.Generator):
        return {"kind": "numpy", "state": _plain(one.bit_generator.state)}
    return {"kind": "bits", "state": _plain(one.state)}


def _put(one: Any, kept: Mapping[str, Any]) -> None:
    state = kept["state"]
    if isinstance(one, torch.Generator):
        one.set_state(state.cpu())
    elif isinstance(one, random.Random):
        one.setstate(state)
    elif isinstance(one, np.random.RandomState):
        one.set_state(_numpy(state))
    elif isinstance(one, np.random.Generator):
        one.bit_generator.state = _numpy(state)
    else:
        one.state = _numpy(state)


def _made(kept: Mapping[str, Any]) -> Any:
    make: dict[str, Callable[[], Any]] = {
        "torch": lambda: torch.Generator(kept["device"]),
        "python": random.Random,
        "legacy": np.random.RandomState,
        "numpy": lambda: np.random.Generator(getattr(np.random, kept["state"]["bit_generator"])()),
        "bits": lambda: getattr(np.random, kept["state"]["bit_generator"])(),
    }
    made = make[kept["kind"]]()
    _put(made, kept)
    return made


def _is_row(value: Any) -> bool:
    if type(value) is list:
        return all(isinstance(one, NUMBERS) for one in value)
    return isinstance(value, Tensor | np.ndarray) and value.ndim == 1 and str(value.dtype) not in ("object", "str")


def _plain(value: Any) -> Any:
    """A copy, of what checkpoints may hold: NumPy's arrays and numbers as Python's."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": value.dtype.str}
    if isinstance(value, np.generic):
        return value.item()
    return value.clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value


def _numpy(value: Any) -> Any:
    """What `_plain` made, with arrays as they were."""
    if isinstance(value, dict) and value.keys() == {"array", "dtype"}:
        return np.array(value["array"], dtype=value["dtype"])
    return {name: _numpy(one) for name, one in value.items()} if isinstance(value, dict) else value


def _like(here: Any, value: Any) -> Any:
    """A copy of what was kept, on the device of what it takes the place of."""
    if isinstance(value, Tensor):
        return value.to(here.device if isinstance(here, Tensor) else "cpu", copy=True)
    return list(value) if isinstance(value, list) else _numpy(value)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.equal(left, right)
    return type(left) is type(right) and bool(left == right)


# --- The global generators ------------------------------------------------------------------------------------------


def global_generators() -> dict[str, Any]:
    """The state of the global random generators, as plain content: torch on CPU and CUDA, NumPy, Python."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
        "python": random.getstate(),
    }


def set_global_generators(state: dict[str, Any]) -> None:
    """Puts every generator where `global_generators` found it."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([saved.cpu() for saved in state["cuda"]])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
