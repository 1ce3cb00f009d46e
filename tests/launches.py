"""How many kernels a function would launch on a GPU, counted by the operations that it runs on the CPU."""

from __future__ import annotations

from collections import Counter

from torch.profiler import ProfilerActivity, profile

NONE = """
    empty empty_strided empty_like new_empty view as_strided as_strided_ t transpose expand expand_as reshape slice
    select detach detach_ resize_ permute squeeze unsqueeze alias narrow flatten unbind split lift_fresh result_type
    _reshape_alias resolve_conj resolve_neg numpy_T item _local_scalar_dense is_nonzero
"""  # these launch nothing
OTHERS = """
    conv2d convolution _convolution linear to _to_copy contiguous clone log_softmax cross_entropy_loss nll_loss_nd
    nll_loss adaptive_avg_pool2d relu relu_ matmul new_zeros zeros zeros_like ones_like ones max_pool2d stack isfinite
"""  # and these what they call; any other is one launch
NONE, OTHERS = ({f"aten::{name}" for name in names.split()} for names in (NONE, OTHERS))


def launches_of(function):
    """A counter of operations."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        function()
    counts = Counter()
    waiting = [event for event in found.events() if event.cpu_parent is None]
    while waiting:
        event = waiting.pop()
        if event.name in OTHERS or event.name.partition("::")[0] not in ("aten", "mkldnn", "afd"):
            waiting += event.cpu_children
        elif event.name not in NONE:
            counts[event.name] += 1
    return counts
