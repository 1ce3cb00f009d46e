"""The ops all of afd is built on: fused kernels on CPU and CUDA, with the same formulas in PyTorch beside them.

Every op takes and returns torch tensors, runs on the tensor's device and torch's current stream, and never waits for
the device. What autocast, a default dtype or device, or another mode of torch does around a call changes no result.
What is written in place is a tensor's memory, whether or not it requires gradients. A setting given as one number is
checked; of one per sample, a tensor in the images' dtype, no value is looked at: NaN makes its sample NaN, and a
negative radius has no meaning and no defined result.

Those of attacks are not differentiable: an attack differentiates the model, not its own steps. The spectral ones are
layers, and are (`afd.ops.spectral`). Which implementation serves a tensor is decided in `afd.ops.backend`.
"""

from __future__ import annotations

from afd.ops import backend
from afd.ops.apgd import apgd_step, apgd_step_, apgd_update_, momentum_point
from afd.ops.loading import load_batch
from afd.ops.spectral import Spectrum, projection_logits, spectral_linear, spectral_norm
from afd.ops.steps import pgd_step, pgd_step_, project, project_, project_plane, random_start, random_start_

__all__ = ["backend", "pgd_step", "pgd_step_", "project", "project_", "project_plane", "random_start", "random_start_"]
__all__ += ["apgd_step", "apgd_step_", "apgd_update_", "momentum_point"]
__all__ += ["load_batch"]
__all__ += ["Spectrum", "projection_logits", "spectral_linear", "spectral_norm"]
