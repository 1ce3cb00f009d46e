"""What gradient attacks share: their common settings, and a checked batch on a model that is left as it was found."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from afd.attacks import engine, execution, inputs, watch
from afd.attacks.capture import CaptureWarning, guard, recordable
from afd.attacks.joining import Joining
from afd.attacks.losses import loss_named
from afd.attacks.piece import Piece
from afd.attacks.python_state import key_of
from afd.attacks.replay import Climb, Replays
from afd.errors import InputTypeError, warn_caller
from afd.nn.modes import local
from afd.nn.outputs import saying_once
from afd.ops import checks
from afd.ops import settings as op_settings

TOLERANCE, TOLERANCE_BF16 = 1e-4, 1e-2  # between the logits of a replay and of the model, as a share of the largest
NO_SETTINGS = {"model", "report", "_replays", "_joining"}
NO_VIEW = ("view size is not compatible", "Cannot view a tensor")  # how torch, and torch.compile, say it
OUTDATED = (
    "an earlier call of this attack replayed a graph in which the model gave other logits than it did by then, though "
    "no weight, hook, mode or attribute of a module had changed: something outside of it had. Its points are those of "
    "the older model. The graph is dropped"
)


class GradientAttack(ABC):
    """Base of the attacks: settles common settings; `_run` is the algorithm.

    Attributes:
        report: what the last call saw of the model (`afd.attacks.watch.Report`); None if it did not look.
        own_graphs: whether, on CUDA, steps are recorded and replayed by the attack itself; False where somebody records
            whole calls.

    Raises:
        InputTypeError: the model is no module, or a setting of another type.
        InputError: a setting out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        norm: str,
        eps: float | Tensor,
        steps: int,
        targeted: bool,
        loss: str,
        bounds: tuple[float, float],
        seed: int,
        precision: str = "fp32",
        piece: int | None = None,
        look: bool = True,
        fold: bool = True,
    ) -> None:
        checks.norm(norm)
        bounds = op_settings.box(bounds)
        checks.bounds(*bounds)
        self.piece = execution.check_execution(precision, piece)
        if not isinstance(model, nn.Module):
            raise InputTypeError(
                f"model is a {type(model).__name__}; it must be a torch.nn.Module, whose mode an attack can set"
            )
        self.model, self.norm, self.steps = model, norm, inputs.count("steps", steps, 0)
        self.eps = inputs.size("eps", eps)
        self.targeted, self.bounds = inputs.truth("targeted", targeted), bounds
        self.seed, self.precision = inputs.counter("seed", seed), precision
        self.look, self.fold = inputs.truth("look", look), inputs.truth("fold", fold)
        self.loss = loss_named(loss, targeted=self.targeted)
        self.report: watch.Report | None = None
        self.own_graphs, self._replays, self._joining = True, Replays(), Joining()
        self._channels_last = True  # until the model has shown that it does not take such images

    @classmethod
    def partial(cls, **settings: Any) -> Callable[[nn.Module], Self]:
        """The attack with everything settled but its model."""
        return functools.partial(cls, **settings)

    def __call__(self, x: Tensor, y: Tensor, *, seed: int | Tensor | None = None, first_sample: int = 0) -> Tensor:
        """Adversarial images.

        Args:
            x: images [N, ...], float32 in `bounds`.
            y: labels [N] int64; the class to reach if `targeted`.
            seed: overrides the attack's own for this call; as an int64 tensor [] it is read on the device (by a graph
                that records this call, at each replay).
            first_sample: index of x's first row in the whole data set, so that batches of any size start alike.

        Returns:
            [N, ...] like x, within eps of it and within bounds.

        Raises:
            InputError, InputTypeError: an argument is not as described, a setting is not one value per sample of x, a
                label is not one of the model's classes, the model does not return logits, or what the gradient must go
                through was made in `torch.inference_mode`.
            ModelError: the model returned NaN, or cannot be differentiated.

        Warns:
            ModelWarning: gradients that are zero or NaN wherever the attack looked, values that are not finite, or
                outputs that are probabilities.
            CaptureWarning: on CUDA, where steps cannot be replayed from a graph, or were and should not have been.
        """
        self.report = None
        inputs.check_form(x, y)
        inputs.counter("first_sample", first_sample)
        for name in ("eps", "alpha"):
            inputs.check_length(name, getattr(self, name, None), x)
        if seed is None:
            seed = self.seed
        elif not isinstance(seed, Tensor):
            seed = inputs.counter("seed", seed)
        with guard(x.device), torch.inference_mode(False), torch.no_grad():
            x, y = inputs.outside_inference(x), inputs.outside_inference(y)
            return self._attacked(x, y, seed, first_sample) if x.numel() else torch.empty_like(x)

    def _attacked(self, x: Tensor, y: Tensor, seed: int | Tensor, first_sample: int) -> Tensor:
        """`__call__` outside of inference mode, on a batch that is not empty."""
        if recordable(x) and self._replays.outdated(wait=False):
            warn_caller(OUTDATED, CaptureWarning)
        self._replays.paused = not self.own_graphs
        x_adv = torch.empty_like(x)
        with engine.evaluating(self.model), saying_once():
            rows = list(execution.pieces(self._module, x, self.piece, self.precision))
            trace = self._fill(x_adv, x, y, rows, seed, first_sample)
            if trace is not None and self._replays.outdated(wait=True):
                self._replays.paused = True  # once more, step by step
                trace = self._fill(x_adv, x, y, rows, seed, first_sample)
        if trace is not None:
            self.report = watch.settle(trace)
        return x_adv

    def _fill(self, x_adv: Tensor, x: Tensor, *given: Any) -> Tensor | None:
        """`_fill_once`, and again in torch's usual layout for a model that takes no other: one that calls ``view``."""
        if self._channels_last:
            drawn = torch.get_rng_state()
            try:
                return self._fill_once(x_adv, x, *given)
            except RuntimeError as error:
                if not any(text in str(error) for text in NO_VIEW):
                    raise
            torch.set_rng_state(drawn)
            self._channels_last, self._joining = False, Joining(channels_last=False)
        return self._fill_once(x_adv, x, *given)

    def _fill_once(
        self, x_adv: Tensor, x: Tensor, y: Tensor, pieces: list[slice], seed: int | Tensor, first_sample: int
    ) -> Tensor | None:
        """Runs the algorithm piece by piece into x_adv; returns what was noted on the way, if anybody looks."""
        largest_label = inputs.largest_label(x, y, self.bounds) if self.look else -1
        trace = watch.new_trace(len(x), x.device) if self.look else None
        self._replays.begin()
        with self._joining.joined(self._module) if self.fold else nullcontext():
            for rows in pieces:
                images, labels = self._laid_out(x[rows]), y[rows]
                first = first_sample + rows.start
                piece = Piece(images, labels, labels, rows, seed, first, largest_label, trace)
                x_adv[rows] = self._run(piece)
        return trace

    def _laid_out(self, x: Tensor) -> Tensor:
        return execution.channels_last(x, self._module) if self._channels_last else x.contiguous()

    @property
    def _module(self) -> nn.Module:
        """What computes the model here."""
        return local(self.model)

    def perturb(self, x: Tensor, y: Tensor, *, seed: int | Tensor | None = None, first_sample: int = 0) -> Tensor:
        """The same as calling the attack."""
        return self(x, y, seed=seed, first_sample=first_sample)

    @abstractmethod
    def _run(self, piece: Piece) -> Tensor:
        """The algorithm on a checked piece that is not empty, its model in evaluation mode, without autograd."""

    def _aimed(self, piece: Piece, clean: Tensor | None = None, rank: int = 0) -> Piece:
        """The piece with what the loss is judged by; `clean`: logits of its images, if known; `rank`: of the target."""
        if clean is None and self.look and not self.steps:  # no step will look
            clean = self._clean(piece)
        return replace(
            piece,
            aim=self.loss.aim(lambda: self._clean(piece) if clean is None else clean, piece.y, rank),
        )

    def _ball(self, piece: Piece, radius: float = 1.0) -> dict[str, Any]:
        """Where the iterates may lie, in the words of the ops; `radius` counts in eps."""
        return {"eps": radius * piece.of(self.eps), "bounds": self.bounds, "norm": self.norm}

    def _ascent(self, x_adv: Tensor, piece: Piece, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient, losses and logits at x_adv, with the model in the attack's precision."""
        with execution.autocast(self.precision, x_adv.device):
            grad, losses, logits = engine.loss_gradient(
                self._module, self.loss.value, x_adv, piece.aim, piece.largest_label
            )
        if not piece.first_logits:
            piece.first_logits.append(logits)
        watch.note(piece, step, logits, losses, grad)
        return grad, losses, logits

    def _as_written(self, x: Tensor) -> Tensor:
        """Logits in full precision, of layers that are not joined: what a success must hold up to."""
        with self._joining.suspended():
            return engine.judged(self._module, x)

    def _clean(self, piece: Piece) -> Tensor:
        """Logits of the images themselves, as written, looked at like those of a step."""
        logits = self._as_written(piece.x)
        engine.check_label(piece.largest_label, logits)
        watch.note_clean(piece, logits)
        return logits

    def _climbed(self, climb: Climb, piece: Piece, x_adv: Tensor, *settings: Hashable) -> tuple[Tensor, ...]:
        """climb(piece, x_adv), on CUDA by replaying a graph; `settings` are those of the climb, not of the attack."""
        if not self.steps:
            return climb(piece, x_adv)
        tolerance = TOLERANCE if self.precision == "fp32" else TOLERANCE_BF16
        name = (*settings, *self.settings())
        return self._replays(name, self.model, climb, piece, x_adv, self._first_logits, tolerance, self.memory)

    def _first_logits(self, x_adv: Tensor) -> Tensor:
        with execution.autocast(self.precision, x_adv.device):
            return engine.logits_alone(self._module, x_adv)

    def settings(self) -> Iterator[Hashable]:
        """What a recorded graph holds of the attack: numbers and names, and where per-sample settings lie in memory."""
        for name, value in vars(self).items():
            if name not in NO_SETTINGS:
                yield name, key_of(value, tensors=True)

    def memory(self) -> tuple[object, ...]:
        """What a recorded graph writes to that is neither the model's nor its own."""
        return tuple(self._joining.pairs.values())
