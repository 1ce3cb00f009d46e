"""What classifiers may return, and what is said of anything else."""

from __future__ import annotations

import warnings
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pytest
import torch

from afd.errors import InputError, InputTypeError, ModelWarning
from afd.nn.outputs import logits_of, saying_once

LOGITS = torch.randn(4, 3)
Named = namedtuple("Named", ["logits", "aux_logits"])


class Output(OrderedDict):
    """A mapping with attributes, as Hugging Face's classifiers return."""

    @property
    def logits(self):
        return self["logits"]


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS,),
        [LOGITS, "a text"],
        (LOGITS, torch.randn(4, 3)),  # an auxiliary head
        (LOGITS, torch.randn(4, 8, 2, 2)),  # feature maps
        {"logits": LOGITS, "features": torch.randn(4, 8)},
        SimpleNamespace(loss=None, logits=LOGITS),
        Output(loss=torch.zeros(()), logits=LOGITS),
        Named(LOGITS, torch.randn(4, 5)),
        Named(aux_logits=torch.randn(4, 5), logits=LOGITS),
    ],
    ids=lambda output: type(output).__name__,
)
def test_logits_are_found(output):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert logits_of(output, 4) is LOGITS


def test_a_tuple_with_two_things_that_could_be_logits_is_warned_of():
    features = torch.randn(4, 8)
    with pytest.warns(ModelWarning, match=r"returned a tuple of \[4, 8\], \[4, 3\]; its first entry is taken"):
        assert logits_of((features, LOGITS), 4) is features


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (None, InputTypeError, "a NoneType; it must return logits"),
        ((), InputTypeError, "a tuple of nothing"),
        ({"output": LOGITS}, InputTypeError, "a dict with the keys output; it must .* 'logits'"),
        ((SimpleNamespace(logits=LOGITS), 1), InputTypeError, "a tuple of SimpleNamespace, int"),
        (LOGITS.argmax(1), InputTypeError, "returned torch.int64; logits are floating-point"),
        (LOGITS[:, 0], InputError, r"returned shape \[4\]; a classifier has a logit for each of at least 2 classes"),
        (LOGITS[:3], InputError, r"returned shape \[3, 3\]; it must be logits \[4, K\]"),
        (LOGITS[:, :, None, None], InputError, r"returned shape \[4, 3, 1, 1\]"),
        (
            LOGITS[:, :1],
            InputError,
            r"returned shape \[4, 1\]; a classifier has a logit for each of at least 2 classes",
        ),
        (LOGITS[:, :0], InputError, r"returned shape \[4, 0\]"),
    ],
)
def test_what_holds_no_logits_is_named(output, error, message):
    with pytest.raises(error, match=message):
        logits_of(output, 4)


class Broken:
    """An output whose logits are made too late."""

    @property
    def logits(self):
        raise RuntimeError("gone")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
        (torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged), "nested"),
        (Broken(), "a Broken whose 'logits' cannot be read: RuntimeError: gone"),
    ],
)
def test_logits_in_another_form_of_memory_are_named(output, message):
    with pytest.raises(InputTypeError, match=message):
        logits_of(output, 3)


def test_a_warning_may_be_asked_for_once():
    output = torch.zeros(3, 4), torch.zeros(3, 5)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            with saying_once():
                logits_of(output, 3), logits_of(output, 3)
        logits_of(output, 3)
    assert len(told) == 3
