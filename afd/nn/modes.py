"""Evaluation mode for a model that belongs to somebody else: one thread at a time, and given back as it was."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DataParallel, DistributedDataParallel

from afd.errors import InputError, InputTypeError


@contextmanager
def evaluating(model: nn.Module, keep: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Evaluation mode with frozen parameters; the model is as it was found afterwards, also when the body raises.

    Modes are set by the modules' own ``train()`` and ``eval()``, which may do more than set a flag (an adapter merges
    its weights). Buffers that a forward writes to even so (counts, ranges of a quantisation) are put back. Other
    threads that ask for a model with a module in common wait for the end of the body (so a forward must not wait for a
    thread of its own that attacks a part of the same model).

    Args:
        model: any module; one without any in training mode is not told anything.
        keep: modules in it whose own buffers stay as the body leaves them.

    Raises:
        InputTypeError: it is no module.
        InputError: it cannot be put into evaluation mode, or has lazy layers that have not seen an input yet.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            f"model is a {type(model).__name__}; it must be a torch.nn.Module, which can be put into evaluation mode"
        )
    modules = list(model.modules())
    _check_initialised(modules)
    with _held(modules):
        before = [(module, _training(module)) for module in modules]
        try:
            if any(mode for _, mode in before):
                _evaluate(model)
            trainable = [one for one in model.parameters() if _freezable(one)]
            kept = {id(module) for module in keep}
            buffers = Buffers([module for module in modules if id(module) not in kept])
            try:
                for parameter in trainable:
                    parameter.requires_grad_(False)
                yield
            finally:
                for parameter in trainable:
                    parameter.requires_grad_(True)
                buffers.put_back()
        finally:
            _restore(before)


def local(model: nn.Module) -> nn.Module:
    """The module itself inside of DistributedDataParallel, or of DataParallel on at most one device.

    Both compute what it does; the former would also talk to other processes, and wait for gradients of parameters.
    """
    if isinstance(model, DataParallel) and len(model.device_ids) > 1:
        return model
    if not isinstance(model, DataParallel | DistributedDataParallel):
        return model
    inner: nn.Module = model.module
    return local(inner)


def eager(model: nn.Module) -> bool:
    """Whether all of a model is Python that runs here and now: no TorchScript, nothing compiled, no copies."""
    elsewhere = (torch.jit.ScriptModule, DataParallel, DistributedDataParallel)
    return not any(isinstance(module, elsewhere) or compiled(module) for module in model.modules())


def compiled(module: nn.Module) -> bool:
    """Whether torch.compile has a module in hand, by a wrapper or in place."""
    return wraps_compiled(module) or getattr(module, "_compiled_call_impl", None) is not None


def wraps_compiled(module: nn.Module) -> bool:
    """Whether this is what torch.compile makes of a module; its class lies behind an import that takes seconds."""
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules


def without_wrappers(model: nn.Module) -> nn.Module:
    """The module inside of torch.compile, DataParallel and DistributedDataParallel; any other module as it is."""
    if wraps_compiled(model):
        return without_wrappers(model.get_submodule("_orig_mod"))
    return without_wrappers(model.module) if isinstance(model, DataParallel | DistributedDataParallel) else model


def extended_norms(model: nn.Module) -> list[str]:
    """Classes of BatchNorm layers that do more than torch's own, such as timm's with an activation."""
    norms = (layer for layer in model.modules() if isinstance(layer, _BatchNorm))
    return [type(one).__name__ for one in norms if not type(one).__module__.startswith("torch.nn.")]


def _training(module: nn.Module) -> bool:
    return bool(getattr(module, "training", False))  # frozen TorchScript has no such flag


def _freezable(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and parameter.is_leaf and not parameter.is_inference()


def _check_initialised(modules: list[nn.Module]) -> None:
    for module in modules:
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            raise InputError(
                f"model is a {type(modules[0]).__name__} with a {type(module).__name__}, which has no weights before "
                "it has seen an input; run it once on images first"
            )


def _evaluate(model: nn.Module) -> None:
    try:
        model.eval()
    except NotImplementedError as error:  # of torch.export
        raise InputError(
            f"model is a {type(model).__name__} that says it is in training mode and cannot leave it ({error}); "
            "pass the module that it was made from"
        ) from error


def _restore(before: list[tuple[nn.Module, bool]]) -> None:
    """Each module's mode as it was: from the outermost on, which tells those inside, to those that differ from it."""
    for module, mode in before:
        if _training(module) != mode:
            module.train(mode)
    for module, mode in before:
        if _training(module) != mode:  # its own train() has another opinion than whoever set the flag
            module.training = mode


class Buffers:
    """The buffers of modules, as objects and by their values."""

    def __init__(self, modules: list[nn.Module]) -> None:
        places = [module._buffers for module in modules]
        held = [(place, name, one) for place in places for name, one in place.items() if one is not None]
        self.held = [(place, name, buffer, version_of(buffer)) for place, name, buffer in held]
        self.values = _copies([buffer for _, _, buffer in held])

    @torch.no_grad()
    def put_back(self) -> None:
        """Undoes what was written to them, and what was put in their place.

        Not all that writes is counted as a write (fused observers, ``.data``), so buffers are written to in any case,
        uncounted: a graph that autograd keeps of them stays valid.
        """
        uncounted: list[tuple[Tensor, Tensor]] = []
        for (place, name, buffer, version), values in zip(self.held, self.values, strict=True):
            if isinstance(place, dict) and place.get(name) is not buffer:
                place[name] = buffer
            if buffer.shape != values.shape:
                buffer.data = values
            elif version_of(buffer) != version:
                buffer.copy_(values)
            elif version is not None and _dense(buffer):
                uncounted.append((buffer.data, values))
        for targets, sources in _alike(uncounted):
            torch._foreach_copy_(targets, sources)


class Statistics:
    """What passes did to the running statistics of BatchNorm layers in training, to be done again without a pass.

    With r₀ → r₁ what they did and d the share of r₀ in r₁, statistics r become r₁ + d (r - r₀).
    """

    def __init__(self, model: nn.Module) -> None:
        self.kinds: dict[float | None, list[_BatchNorm]] = {}  # by momentum
        for layer in model.modules():
            if isinstance(layer, _BatchNorm) and layer.training and layer.num_batches_tracked is not None:
                self.kinds.setdefault(layer.momentum, []).append(layer)
        self.before = [self._values(layers) for layers in self.kinds.values()]
        self.after: list[tuple[list[Tensor], Tensor]] = []

    @classmethod
    @contextmanager
    def noted(cls, model: nn.Module) -> Iterator[Statistics]:
        """Notes what the body's passes do."""
        found = cls(model)
        yield found
        found.after = [found._values(layers) for layers in found.kinds.values()]

    @torch.no_grad()
    def replay(self) -> None:
        """Does it once more, to the statistics as they are now.

        As in a pass, that is no change to a graph that autograd keeps of them: buffers are written to uncounted.
        """
        for (momentum, layers), (r0, n0), (r1, n1) in zip(self.kinds.items(), self.before, self.after, strict=True):
            r, n = self._values(layers)
            if momentum is None:  # the mean of all calls: what the calls added is a sum
                kept, old, new = n / (n + n1 - n0), n0 / (n + n1 - n0), n1 / (n + n1 - n0)
            else:
                kept = old = (1 - momentum) ** (n1 - n0)
                new = torch.ones_like(kept)
            terms = []
            for values, shares in ((r, kept), (r1, new), (r0, -old)):
                terms.append(torch._foreach_mul(values, [*shares.unbind(), *shares.unbind()]))
            torch._foreach_add_(terms[0], terms[1])
            torch._foreach_add_(terms[0], terms[2])
            torch._foreach_copy_([one.data for one in self._buffers(layers)], terms[0])
            counts = [layer.num_batches_tracked for layer in layers]
            torch._foreach_add_(counts, list((n1 - n0).long().unbind()))  # type: ignore[arg-type]

    @classmethod
    def _values(cls, layers: list[_BatchNorm]) -> tuple[list[Tensor], Tensor]:
        """Copies of all running means, then variances, and how often each layer was called, float64 [L]."""
        counts: Any = [layer.num_batches_tracked for layer in layers]
        return [one.clone() for one in cls._buffers(layers)], torch.stack(counts).double()

    @staticmethod
    def _buffers(layers: list[_BatchNorm]) -> list[Tensor]:
        found = [layer.running_mean for layer in layers] + [layer.running_var for layer in layers]
        return [one for one in found if one is not None]


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """The body's forwards of `model` leave BatchNorm's running statistics alone; those of its parts alone do not."""
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    held: list[tuple[_BatchNorm, float | None, Tensor | None]] = []

    def begin(*_: object) -> None:
        for layer in layers:
            calls = layer.num_batches_tracked
            held.append((layer, layer.momentum, None if calls is None else calls.clone()))
            layer.momentum = 0.0

    def end(*_: object) -> None:
        for layer, momentum, calls in held:
            layer.momentum = momentum
            if calls is not None and layer.num_batches_tracked is not None:
                layer.num_batches_tracked.copy_(calls)
        held.clear()

    hooks = model.register_forward_pre_hook(begin), model.register_forward_hook(end, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def version_of(tensor: Tensor | None) -> int | None:
    """How often a tensor has been written to, as far as torch counts it."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def _dense(tensor: Tensor) -> bool:
    """Whether a tensor has a place in memory for each of its elements, in the usual order."""
    return tensor.layout is torch.strided and not tensor.is_nested and tensor.is_contiguous()


def _alike(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Pairs of tensors by dtype and device: what lists of is worked on in few launches."""
    found: dict[object, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in pairs:
        targets, sources = found.setdefault((target.dtype, target.device), ([], []))
        targets.append(target)
        sources.append(source)
    return list(found.values())


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of tensors, on GPUs those that are numbers in few launches."""
    together = [one.is_cuda and one.dtype in (torch.float32, torch.int64) for one in tensors]
    numbers = [one.detach() for one, listed in zip(tensors, together, strict=True) if listed]
    copied = iter(torch._foreach_mul(numbers, 1) if numbers else ())
    return [next(copied) if listed else one.detach().clone() for one, listed in zip(tensors, together, strict=True)]


# --- One thread at a time -------------------------------------------------------------------------------------------

_changed = threading.Condition()
_holders: dict[int, tuple[int, int]] = {}  # by a module's id: the thread that holds it, and how many times


def _forget_other_threads() -> None:
    """In a child process, which has only the thread that forked: nobody else is there to let go."""
    global _changed, _holders
    me = threading.get_ident()
    _changed = threading.Condition()
    _holders = {name: holder for name, holder in list(_holders.items()) if holder[0] == me}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)


@contextmanager
def _held(modules: list[nn.Module]) -> Iterator[None]:
    """Keeps other threads from holding any of these modules; takes all of them at once, so that nobody waits in a ring.

    Models that share a module (two wrappers around one network) exclude each other, and others do not. The same thread
    may hold a module more than once.
    """
    me, names = threading.get_ident(), {id(module) for module in modules}
    with _changed:
        _changed.wait_for(lambda: all(_holders.get(name, (me, 0))[0] == me for name in names))
        for name in names:
            _holders[name] = (me, _holders.get(name, (me, 0))[1] + 1)
    try:
        yield
    finally:
        with _changed:
            for name in names:
                count = _holders[name][1] - 1
                if count:
                    _holders[name] = (me, count)
                else:
                    del _holders[name]
            _changed.notify_all()


@contextmanager
def held(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keeps other threads from evaluating, or holding, any of these modules; waits until none does.

    Args:
        modules: all that are held, such as ``model.modules()``; the same thread may hold them already.
    """
    with _held(list(modules)):
        yield
