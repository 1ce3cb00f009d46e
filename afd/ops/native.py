"""The compiled kernels: the only module that imports `afd._C`, and the last one to see a tensor as a tensor.

Arguments arrive checked by `afd.ops.checks`; here layout is settled, addresses taken, and the kernel
launched on torch's current stream under the tensor's device guard. Tensors whose memory layout the kernels cannot walk
are copied to a contiguous one first (and the result copied back), so every layout gives the same values (up to the
last bit where L2 and L1 sum a sample in memory order).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_C: ModuleType | None
try:
    from afd import _C  # type: ignore[attr-defined, no-redef]  # torch comes first: the kernels use its OpenMP threads
except ImportError as error:
    _C, _missing = None, f"the compiled module afd._C cannot be imported ({error})"
else:
    _missing = ""

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/include/afd/common.h, DType
_NORM_CODES = {"Linf": 0, "L2": 1, "L1": 2}  # csrc/include/afd/common.h, Norm
_ISAS = ("baseline", "avx2", "avx512")  # csrc/include/afd/common.h, Isa
_isa = _ISAS.index(_C.cpu.usable_isas()[-1]) if _C else 0


def import_error() -> str | None:
    """Why `afd._C` could not be imported, or None."""
    return _missing or None


@functools.cache
def device_reason(device: torch.device) -> str | None:
    """Why no kernel serves tensors on `device`, or None if they do."""
    if _C is None:
        return _missing
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"there are no kernels for {device.type} tensors"
    if not hasattr(_C, "cuda"):
        return "afd was built without CUDA kernels (no nvcc at build time, or AFD_CUDA=off)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device" + ("" if torch.version.cuda else " (this torch is a CPU build)")
    major, minor = torch.cuda.get_device_capability(device)
    if not covers(_C.cuda.architectures, major, minor):
        return f"the GPU is sm_{major}{minor}, which the compiled architectures {_C.cuda.architectures} do not cover"
    return None


def covers(architectures: str, major: int, minor: int) -> bool:
    """Whether code compiled for `architectures` (CMake's notation, comma-separated) runs on sm_<major><minor>."""
    for entry in architectures.split(","):
        number, _, kind = entry.partition("-")
        compiled_major, compiled_minor = divmod(int(number), 10)
        machine_code = kind != "virtual" and compiled_major == major and compiled_minor <= minor
        ptx = kind != "real" and (compiled_major, compiled_minor) <= (major, minor)
        if machine_code or ptx:
            return True
    return False


def why_not(x: Tensor) -> str | None:
    """Why no kernel serves an op on `x`, or None if one does."""
    reason = device_reason(x.device)
    if reason is None and x.dtype != torch.float32:
        reason = f"the kernels' iterates are float32, not {x.dtype}"
    return reason


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (False where the compiled module is missing)."""
    return _C is not None and bool(_C.cpu.multiplies_bf16())


def build_info() -> dict[str, Any]:
    """What the compiled module holds: compiler, CPU instruction sets, CUDA runtime and architectures."""
    if _C is None:
        return {"missing": _missing}
    cuda = getattr(_C, "cuda", None)
    return {
        "compiler": _C.compiler,
        "cpu_isas": _C.cpu.compiled_isas(),
        "cpu_isa": _ISAS[_isa],
        "cpu_threads": torch.get_num_threads() if _C.cpu.has_team() else 1,
        "cpu_threads_from": "torch's OpenMP" if _C.cpu.has_team() else "no OpenMP runtime found in the process",
        "cuda_runtime": cuda and f"{cuda.runtime_version // 1000}.{cuda.runtime_version % 1000 // 10}",
        "cuda_architectures": cuda and cuda.architectures,
    }


# --- From tensors to launches ---------------------------------------------------------------------------------------


@functools.cache
def workspace_size(op: str, *extent: int) -> int:
    """Elements of scratch memory that a kernel needs."""
    assert _C is not None
    size: int = getattr(_C, f"{op}_workspace")(*extent)
    return size


def launch(name: str, out: Tensor, *arguments: Any) -> None:
    """Runs a kernel where `out` lives and marks `out` as changed."""
    assert _C is not None
    if out.is_cuda:
        with torch.cuda.device(out.device):
            stream = torch.cuda.current_stream().cuda_stream
            if status := getattr(_C.cuda, name)(*arguments, out.device.index, stream):
                raise RuntimeError(f"the CUDA kernel {name} failed to launch: {_C.cuda.error_string(status)}")
    else:
        getattr(_C.cpu, name)(*arguments, _isa, torch.get_num_threads())
    torch.autograd.graph.increment_version(out)


def _extent(x: Tensor) -> tuple[int, int]:
    """Samples, and elements in each."""
    samples = x.shape[0]
    return samples, x.numel() // samples if samples else 0


def _address(per_sample: Tensor | None) -> int:
    return 0 if per_sample is None else per_sample.data_ptr()


def _workspace(out: Tensor, norm: str) -> Tensor | None:
    """Device memory for the partial sums of samples that do not fit on chip, or None where none is needed."""
    assert _C is not None
    doubles = _C.cuda.l2_workspace(*_extent(out)) if out.is_cuda and norm == "L2" else 0
    return torch.empty(doubles, dtype=torch.float64, device=out.device) if doubles else None


def _in_float32(grad: Tensor, norm: str) -> Tensor:
    """A float64 gradient with the same step: scaled first, for the cast alone would flush tiny gradients to zero."""
    if norm == "Linf" or not grad.numel():
        return grad.sign().float()
    finite = grad.nan_to_num()
    largest = finite.abs().amax(dim=tuple(range(1, grad.dim())), keepdim=True) if grad.dim() > 1 else finite.abs()
    return (finite / largest.clamp_min(torch.finfo(grad.dtype).tiny)).float()


def _plane_in_float32(w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same planes of float64 weights: scaled first, likewise."""
    largest = w.abs().reshape(len(w), -1).amax(1) if w.numel() else torch.ones_like(b, dtype=w.dtype)
    scale = torch.where(largest == 0, 1.0, largest)
    most = torch.finfo(b.dtype).max
    scaled = torch.where(b.isfinite(), (b / scale).clamp(-most, most), b.double())
    return (w / scale.view(-1, *[1] * (w.dim() - 1))).float(), scaled.to(b.dtype)


def _contiguous(tensors: Sequence[Tensor]) -> bool:
    return all(map(Tensor.is_contiguous, tensors))


def _walked_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors hold their samples without gaps and in one order (strides of size-1 dimensions are idle)."""
    return all(map(Tensor.is_contiguous, tensors)) or all(
        x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) for x in tensors
    )


def _rows_walked_alike(tensors: Sequence[Tensor]) -> bool:
    x_adv, grad, _loss, _fooled, x_best, grad_best, x_best_adv = tensors
    return _walked_alike((x_adv, x_best, x_best_adv)) and _walked_alike((grad, grad_best))


def _else_on_copies(
    tensors: int, *, updated: int = 0, walkable: Callable[[Sequence[Tensor]], bool] = _walked_alike
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Has a launch run on contiguous copies unless its first `tensors` arguments are `walkable`.

    What the first `updated` arguments become is written back; if that is 0, the first one is an output, never read.
    """

    def decorate(op: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(op)
        def run(*arguments: Any) -> None:
            if walkable(arguments[:tensors]):
                return op(*arguments)
            read = arguments if updated else arguments[1:]
            dense = [a.contiguous() if isinstance(a, Tensor) else a for a in read]
            if not updated:
                dense.insert(0, torch.empty_like(arguments[0], memory_format=torch.contiguous_format))
            op(*dense)
            for target, result in zip(arguments[: updated or 1], dense, strict=False):
                if result is not target:
                    target.copy_(result)
            return None

        return run

    return decorate


# --- Ops ------------------------------------------------------------------------------------------------------------


@_else_on_copies(3)
def project(
    out: Tensor,
    x_adv: Tensor,
    x: Tensor,
    eps: float,
    low: float,
    high: float,
    epsilons: Tensor | None,
    norm: str,
) -> None:
    """`afd.ops.project` into `out`, which may be x_adv."""
    workspace = _workspace(out, norm)
    launch(
        "project", out,
        x_adv.data_ptr(), x.data_ptr(), out.data_ptr(), *_extent(x), eps, _address(epsilons), low, high,
        _NORM_CODES[norm], _address(workspace),
    )  # fmt: skip


@_else_on_copies(4, walkable=lambda tensors: _walked_alike([one for one in tensors if one is not None]))
def project_plane(
    out: Tensor,
    x: Tensor,
    w: Tensor,
    at: Tensor | None,
    b: Tensor,
    distance: Tensor,
    low: float,
    high: float,
    norm: str,
) -> None:
    """`afd.ops.project_plane` into `out` and `distance`."""
    if w.dtype == torch.float64:
        w, b = _plane_in_float32(w, b)
    w, b = w.float(), b.contiguous()
    launch(
        "project_plane", out,
        x.data_ptr(), w.data_ptr(), b.data_ptr(), _address(at), out.data_ptr(), distance.data_ptr(),
        x.shape[0], w.shape[0], _extent(x)[1], low, high, _NORM_CODES[norm],
    )  # fmt: skip


@_else_on_copies(4)
def pgd_step(
    out: Tensor,
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    alpha: float,
    eps: float,
    low: float,
    high: float,
    alphas: Tensor | None,
    epsilons: Tensor | None,
    norm: str,
    sparsity: float,
    sparsities: Tensor | None,
) -> None:
    """`afd.ops.pgd_step` into `out`, which may be x_adv."""
    if grad.dtype == torch.float64:
        grad = _in_float32(grad, norm)
    workspace = _workspace(out, norm)
    launch(
        "pgd_step", out,
        x_adv.data_ptr(), x.data_ptr(), grad.data_ptr(), out.data_ptr(), _DTYPE_CODES[grad.dtype], *_extent(x),
        alpha, _address(alphas), eps, _address(epsilons), low, high,
        _NORM_CODES[norm], sparsity, _address(sparsities), _address(workspace),
    )  # fmt: skip


@_else_on_copies(2, walkable=_contiguous)  # elements are numbered in logical order
def random_start(
    out: Tensor,
    x: Tensor,
    eps: float,
    low: float,
    high: float,
    seed: int,
    first_sample: int,
    epsilons: Tensor | None,
    norm: str,
    key: Tensor | None,
) -> None:
    """`afd.ops.random_start` into `out`, which may be x."""
    if norm != "Linf" and x.data_ptr() == out.data_ptr():
        x = x.clone()  # out holds the draws while their norm is not yet known
    launch(
        "random_start", out,
        x.data_ptr(), out.data_ptr(), *_extent(x), eps, _address(epsilons), low, high, _NORM_CODES[norm],
        seed, _address(key), first_sample,
    )  # fmt: skip


@_else_on_copies(4, updated=2)
def apgd_step(
    x_adv: Tensor,
    x_adv_old: Tensor,
    x: Tensor,
    grad: Tensor,
    step: float,
    eps: float,
    a: float,
    low: float,
    high: float,
    steps: Tensor | None,
    epsilons: Tensor | None,
) -> None:
    """`afd.ops.apgd_step_`: x_adv_old becomes x_adv, and x_adv the next iterate."""
    if grad.dtype == torch.float64:
        grad = grad.sign().float()
    launch(
        "apgd_step", x_adv,
        x_adv.data_ptr(), x_adv_old.data_ptr(), x.data_ptr(), grad.data_ptr(), _DTYPE_CODES[grad.dtype], *_extent(x),
        step, _address(steps), eps, _address(epsilons), a, 1 - a, low, high,
    )  # fmt: skip
    torch.autograd.graph.increment_version(x_adv_old)


@_else_on_copies(7, updated=15, walkable=_rows_walked_alike)
def apgd_update(*arguments: Any) -> None:
    """`afd.ops.apgd_update_`; arguments as `reference.apgd_update` has them."""
    *tensors, interval, rho = arguments
    x_adv, grad, loss, fooled, *_ = tensors
    launch(
        "apgd_update", x_adv,
        *(tensor.data_ptr() for tensor in tensors), grad.element_size(), *_extent(x_adv),
        interval > 0, math.floor(rho * interval),
    )  # fmt: skip
    for tensor in tensors:
        if tensor is not x_adv and tensor is not loss and tensor is not fooled:
            torch.autograd.graph.increment_version(tensor)


def load_batch(
    out: Tensor,
    pixels: Tensor,
    index: Tensor,
    draws: Tensor | None,
    scale: float,
    padding: int,
    flip: bool,
    channels_last: bool,
) -> None:
    """`afd.ops.load_batch` into `out`, [B, C, H, W] in the layout asked for."""
    index, draws = index.contiguous(), None if draws is None else draws.contiguous()
    images, channels, height, width = pixels.shape
    launch(
        "load_batch", out,
        pixels.data_ptr(), index.data_ptr(), _address(draws), out.data_ptr(),
        images, len(index), channels, height, width, scale, padding, flip, channels_last,
    )  # fmt: skip
