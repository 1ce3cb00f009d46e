"""What gradient attacks share: their common settings, and a checked batch on a model that is left as it was found."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from afd.attacks import diagnostics, engine, inputs
from afd.attacks.ball import Ball, ball_of_norm
from afd.attacks.batchnorm import BatchNorms
from afd.attacks.inputs import Call, Chunk
from afd.attacks.joining import Joining
from afd.attacks.losses import Recorder, Trajectory, loss_of
from afd.attacks.replay import AttackGraphs, StepsFn
from afd.attacks.settings import SIZES, AttackSettings
from afd.errors import InputError, InputTypeError, warn_caller
from afd.execution import needs_plain_layout
from afd.graphs import CaptureWarning, capturable, guard
from afd.nn.modes import local
from afd.nn.outputs import saying_once
from afd.python_state import key_of

TOLERANCE, TOLERANCE_BF16 = 1e-4, 1e-2  # between the logits of a replay and of the model, as a share of the largest
NO_SETTINGS = {"model", "report", "which", "execution", "_graphs", "_joining", "_batchnorms", "_scalar"}
NO_SETTINGS |= {"trajectory", "_recorder"}
OUTDATED = (
    "an earlier call of this attack replayed a graph in which the model gave other logits than it did by then, though "
    "no weight, hook, mode or attribute of a module had changed: something outside of it had. Its points are those of "
    "the older model. The graph is dropped"
)


class ScalarLossError(Exception):
    """A loss of the whole batch was given a part of it."""


class GradientAttack(ABC):
    """Base of the attacks: settles common settings; `_run` is the algorithm.

    Attributes:
        execution: how it runs (`afd.execution.AttackExecution`).
        report: what the last call saw of the model (`afd.attacks.diagnostics.Report`); None if it did not look.
        record_trajectory: whether calls keep their `trajectory`; steps are then not replayed from graphs. False.
        trajectory: loss and radius at each point of the last call (`afd.attacks.Trajectory`), if it was to keep them.
        own_graphs: whether, on CUDA, steps are captured and replayed by the attack itself; False where somebody
            captures whole calls.

    Raises:
        InputTypeError: the model is no module.
        InputError: the settings ask for features, and the model offers none.
    """

    random_start = True
    records = False  # whether it has a trajectory
    copies = 1  # images that it returns for each image, beside each other

    def __init__(self, model: nn.Module, settings: AttackSettings, *, steps: int, seed: int = 0) -> None:
        if not isinstance(model, nn.Module):
            raise InputTypeError(
                f"model is a {type(model).__name__}; it must be a torch.nn.Module, whose mode an attack can set"
            )
        self.model, self.norm, self.steps = model, settings.norm, steps
        self.eps, self.bounds, self.targeted = settings.eps, settings.bounds, settings.targeted
        self.loss, self.outputs = loss_of(settings.loss, targeted=settings.targeted), settings.outputs
        self.seed, self.execution = seed, settings.execution
        self.validate, self.fold_batchnorm = settings.validate, settings.fold_batchnorm
        self.batchnorm = settings.batchnorm
        self.report: diagnostics.Report | None = None
        self.own_graphs, self._graphs, self._joining, self._batchnorms = True, AttackGraphs(), Joining(), BatchNorms()
        self.record_trajectory, self.trajectory = False, cast(Trajectory | None, None)
        self._recorder: Recorder | None = None
        self._scalar = False  # until the loss has returned one value for all
        if self.outputs == "features":
            engine.check_offers(self._module, "features")

    @classmethod
    def partial(cls, **settings: Any) -> Callable[[nn.Module], Self]:
        """The attack with everything settled but its model."""
        return functools.partial(cls, **settings)

    def __call__(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        seed: int | Tensor | None = None,
        first_sample: int | Tensor = 0,
        target: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Adversarial images.

        Args:
            x: images [N, ...], float32 in `bounds`.
            y: labels [N] int64; the class to reach if `targeted`. Or soft labels [N, K], floating and >= 0, for "ce"
                and a loss of your own (APGD leaves the likeliest of them). Or None, where the loss needs none: with
                "kl", or where it is given a target.
            seed: overrides the attack's own for this call; as an int64 tensor [] it is read on the device (by a graph
                that captures this call, at each replay).
            first_sample: index of x's first row in the whole data set, so that batches of any size start alike; or that
                of each row, [N] int64, ascending, which the host reads.
            target: [N, ...], what a loss of your own is called with, y if there is none; with "kl" the clean logits
                [N, K], which spares their forward.
            start: images [N, ...] like x to begin from, as they are, instead of x or a random point (APGD projects
                them, and begins its first run there).

        Returns:
            [N, ...] like x, within eps of it and within bounds.

        Raises:
            InputError, InputTypeError: an argument is not as described, a setting is not one value per sample of x, a
                label is not one of the model's classes, the model does not return logits, a loss of your own not what
                can be differentiated, or what the gradient must go through was made in `torch.inference_mode`.
            ModelError: the model returned NaN, or cannot be differentiated.

        Warns:
            ModelWarning: gradients that are zero or NaN wherever the attack looked, values that are not finite, or
                outputs that are probabilities.
            CaptureWarning: on CUDA, where steps cannot be replayed from a graph, or were and should not have been.
        """
        self.report = self.trajectory = None
        if self.record_trajectory and not self.records:
            raise InputError(f"record_trajectory is True; {type(self).__name__} keeps none, as PGD, MIM and APGD do")
        if seed is None:
            seed = self.seed
        elif not isinstance(seed, Tensor):
            seed = inputs.counter("seed", seed)
        call = Call(x, y, target, start, seed, first_sample)
        call.check(self.loss, starts=self.random_start)
        _check_places(first_sample, x)
        for name in SIZES:
            inputs.check_length(name, getattr(self, name, None), x)
        with guard(x.device), torch.inference_mode(False), torch.no_grad():
            return self._attacked(call.outside_inference()) if x.numel() else torch.empty_like(x)

    def _attacked(self, call: Call) -> Tensor:
        """`__call__` outside of inference mode, on a batch that is not empty."""
        if capturable(call.x) and self._graphs.outdated(wait=False):
            warn_caller(OUTDATED, CaptureWarning)
        self._graphs.paused = not self.own_graphs or self.batchnorm != "eval" or self.record_trajectory
        x_adv = _room_for(call.x, self.copies)
        with self._batchnorms.running(self.model, self.batchnorm), saying_once():
            counters = self._fill(x_adv, call)
            if counters is not None and self._graphs.outdated(wait=True):
                self._graphs.paused = True  # once more, eagerly
                counters = self._fill(x_adv, call)
        if counters is not None:
            self.report = diagnostics.summarize(counters)
        if self._recorder is not None:
            self.trajectory, self._recorder = self._recorder.trajectory(len(call.x)), None
        return x_adv

    def _fill(self, x_adv: Tensor, call: Call) -> Tensor | None:
        """`_fill_once`, and again from the start where the model, or the loss, does not take what it is shown.

        That is torch's usual layout for a model that takes no other, one that calls ``view``; and the whole batch for a
        loss that is one value for all.
        """
        while True:
            undecided = self.loss.judged_by == "target" and not self._scalar
            draw_again = _draws(call.x.device if undecided else torch.device("cpu"))
            try:
                return self._fill_once(x_adv, call)
            except RuntimeError as error:
                if not self.execution.channels_last or not needs_plain_layout(error):
                    raise
                self.execution = replace(self.execution, channels_last=False)
                self._joining = Joining(channels_last=False)
            except ScalarLossError:
                self._scalar = True
            draw_again()
            self._batchnorms.begin_again()

    def _fill_once(self, x_adv: Tensor, call: Call) -> Tensor | None:
        """Runs the algorithm chunk by chunk into x_adv; returns what was noted on the way, if anybody looks."""
        x = call.x
        chunks = [slice(0, len(x))] if self._as_one else list(self.execution.chunks(self._module, x))
        largest_label = inputs.largest_label(x, call.y, self.bounds, call.start) if self.validate else -1
        counters = diagnostics.new_counters(len(x), x.device) if self.validate else None
        self._recorder = Recorder() if self.record_trajectory else None
        self._graphs.begin()
        self._batchnorms.find(lambda: self._first_outputs(self._laid_out(x)))
        joins = self.fold_batchnorm and self.batchnorm == "eval"
        with self._joining.joined(self._module, self.precision != "fp32") if joins else nullcontext():
            for rows in chunks:
                own = slice(rows.start * self.copies, rows.stop * self.copies)
                x_adv[own] = self._run(call.chunk(rows, self._laid_out, largest_label, counters))
        return counters

    def _laid_out(self, x: Tensor) -> Tensor:
        return self.execution.laid_out(x, self._module)

    @property
    def precision(self) -> str:
        """That the model runs in."""
        return self.execution.precision

    @precision.setter
    def precision(self, value: str) -> None:
        self.execution = replace(self.execution, precision=value)

    @property
    def chunk_size(self) -> int | None:
        """Rows attacked together, if that is not left to the library."""
        return self.execution.chunk_size

    @chunk_size.setter
    def chunk_size(self, value: int | None) -> None:
        self.execution = replace(self.execution, chunk_size=value)

    @property
    def _module(self) -> nn.Module:
        """What computes the model here."""
        return local(self.model)

    @property
    def _as_one(self) -> bool:
        """Whether samples hang on one another, so that all of them are attacked together to the end."""
        return self._scalar or self.batchnorm != "eval"

    @property
    def _shown(self) -> engine.Outputs:
        """What of the model the loss, and who looks on, are shown."""
        return engine.features if self.outputs == "features" else engine.logits

    def perturb(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        seed: int | Tensor | None = None,
        first_sample: int | Tensor = 0,
        target: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """The same as calling the attack."""
        return self(x, y, seed=seed, first_sample=first_sample, target=target, start=start)

    @abstractmethod
    def _run(self, chunk: Chunk) -> Tensor:
        """The algorithm on a checked chunk that is not empty, its model in evaluation mode, without autograd."""

    def _with_loss_target(self, chunk: Chunk, clean: Tensor | None = None, rank: int = 0) -> Chunk:
        """The chunk with what the loss is judged by; `clean`: logits of its images, if known; `rank`: of the target."""
        if clean is None and self.validate and not self.steps:  # no step will look
            clean = self._clean(chunk)
        given = chunk.y
        if chunk.target is not None:
            given, clean = chunk.target, chunk.target  # one of them is what this loss is judged by
        loss_target = self.loss.target(lambda: self._clean(chunk) if clean is None else clean, given, rank)
        return replace(chunk, loss_target=loss_target, target=None, start=None)

    def _ball(self, chunk: Chunk, radius: float = 1.0) -> Ball:
        """Where the iterates may lie; `radius` counts in eps."""
        return Ball(self.norm, chunk.of(self.eps, radius), self.bounds)

    def _ascent(self, x_adv: Tensor, chunk: Chunk, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient, losses and logits at x_adv, with the model in the attack's precision."""
        self._batchnorms.begin_forward()
        are_logits = self._shown is not engine.features
        check = chunk.check_classes if are_logits else None
        with self.execution.autocast(x_adv.device):
            grad, losses, outputs = engine.loss_gradient(
                self._module, self.loss.value, x_adv, chunk.loss_target, check, self._shown
            )
        if not losses.dim():
            losses = self._everybodys(losses, chunk)
        if not chunk.first_outputs:
            chunk.first_outputs.append(outputs)
        diagnostics.note(chunk, step, outputs, losses, grad, are_logits)
        return grad, losses, outputs

    def _record(self, point: int, chunk: Chunk, x_adv: Tensor, losses: Tensor) -> None:
        """Adds a point of a run to the trajectory, if one is kept."""
        if self._recorder is not None:
            self._recorder.add(point, chunk.rows, losses, ball_of_norm(self.norm).distance(x_adv, chunk.x))

    def _record_run(self, *numbers: int) -> None:
        """Says which of several runs is recorded from now on, in numbers that order them."""
        if self._recorder is not None:
            self._recorder.run = numbers

    def _losses(self, x_adv: Tensor, chunk: Chunk) -> Tensor:
        """The losses [n] at points, without a gradient."""
        assert chunk.loss_target is not None
        self._batchnorms.begin_forward()
        with self._batchnorms.untouched(), self.execution.autocast(x_adv.device):
            outputs, _ = self._shown(self._module, x_adv)
            losses = self.loss.value(outputs, chunk.loss_target)
        return losses if losses.dim() else self._everybodys(losses, chunk)

    def _everybodys(self, loss: Tensor, chunk: Chunk) -> Tensor:
        """One loss of the whole batch, as one for each of its samples."""
        if not chunk.whole:
            raise ScalarLossError
        self._scalar = True
        return loss.repeat(len(chunk.x))

    def _as_written(self, x: Tensor) -> Tensor:
        """Logits in full precision, of layers that are not joined: what a success must hold up to."""
        self._batchnorms.begin_forward()
        with self._joining.suspended(), self._batchnorms.untouched():
            return engine.judged(self._module, x)

    def _class_to_leave(self, chunk: Chunk, clean: Tensor | None = None) -> Tensor:
        """Or to reach, if targeted: [n], of labels, soft labels or, where there are none, the clean logits."""
        if chunk.y is not None:
            return chunk.y.argmax(1) if chunk.y.is_floating_point() else chunk.y
        if self.targeted:
            raise InputError(f"y is None; with targeted=True, {type(self).__name__} needs the classes to reach, [N]")
        return (self._clean(chunk) if clean is None else clean).argmax(1)

    @property
    def _approximates(self) -> bool:
        """Whether the model runs in low precision, or joined: a success counts once `_as_written` confirms it."""
        return self.precision != "fp32" or self._joining.approximates

    def _clean(self, chunk: Chunk) -> Tensor:
        """Logits of the images themselves, as written, looked at like those of a step."""
        logits = self._as_written(chunk.x)
        chunk.check_classes(logits)
        diagnostics.note_nan(chunk, 0, logits)
        return logits

    def _all_steps(self, steps_fn: StepsFn, chunk: Chunk, x_adv: Tensor, *settings: Hashable) -> tuple[Tensor, ...]:
        """steps_fn(chunk, x_adv), on CUDA by replaying a graph; `settings` are its own, not the attack's."""
        if not self.steps:
            return steps_fn(chunk, x_adv)
        tolerance = TOLERANCE if self.precision == "fp32" else TOLERANCE_BF16
        name = (*settings, *self.settings())
        return self._graphs(name, self.model, steps_fn, chunk, x_adv, self._first_outputs, tolerance, self.memory)

    def _first_outputs(self, x_adv: Tensor) -> Tensor:
        with self.execution.autocast(x_adv.device):
            return engine.logits_alone(self._module, x_adv, self._shown)

    def settings(self) -> Iterator[Hashable]:
        """What a captured graph holds of the attack: numbers and names, and where what it reads lies in memory.

        Live numbers on the model's device lie there; on another they count as the numbers that they are.
        """
        here = next((one.device for one in chain(self.model.parameters(), self.model.buffers())), None)
        for name, value in {**vars(self), **vars(self.execution)}.items():
            if name in NO_SETTINGS:
                continue
            if isinstance(value, Tensor) and not value.dim() and value.device != (here or value.device):
                value = float(value)
            yield name, key_of(value, tensors=True)
        yield "loss's own", key_of(getattr(self.loss.value, "function", None), tensors=True)

    def memory(self) -> tuple[object, ...]:
        """What a captured graph writes to that is neither the model's nor its own."""
        return tuple(self._joining.kept.values())


def _check_places(first_sample: Any, x: Tensor) -> None:
    """Raises InputError or InputTypeError unless this is the index of the first of images x, or that of each."""
    if not isinstance(first_sample, Tensor):
        inputs.counter("first_sample", first_sample)
    elif first_sample.dtype != torch.int64 or first_sample.shape != x.shape[:1]:
        raise InputError(
            f"first_sample is {first_sample.dtype} of shape {list(first_sample.shape)}; it must be an integer, or one "
            f"for each image, torch.int64 of shape [{len(x)}]"
        )


def _room_for(x: Tensor, copies: int) -> Tensor:
    """Memory for so many images of each, laid out as images x [N, ...] are: [N * copies, ...]."""
    if copies == 1:
        return torch.empty_like(x)
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    shape = len(x) * copies, *x.shape[1:]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _draws(device: torch.device) -> Callable[[], None]:
    """What puts torch's generators, the CPU's and that of a device, back to where they are now."""
    kept = torch.get_rng_state()
    on_cuda = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    on_device = torch.cuda.get_rng_state(device) if on_cuda else None

    def put_back() -> None:
        torch.set_rng_state(kept)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)

    return put_back
