"""What STAGES and BUDGET mean, and what they may not be."""

from __future__ import annotations

import pytest
from gpu_day.choice import ChoiceError, box, seconds_named, stages_named
from hypothesis import given
from hypothesis import strategies as st

KNOWN = range(1, 7)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("1,2,3", {1: "", 2: "", 3: ""}),
        ("6, 1", {1: "", 6: ""}),
        ("4:resnet50,2", {2: "", 4: "resnet50"}),
    ],
)
def test_stages_come_in_order_with_their_words(text, meant):
    found = stages_named(text, KNOWN)
    assert found == meant
    assert list(found) == list(meant)


@pytest.mark.parametrize("text", ["", "7", "0", "1,,2", "1,1", "one", "-1", "1:", "1.5", "²", "1;2"])
def test_other_stages_are_named_with_what_is_allowed(text):
    with pytest.raises(ChoiceError, match=r"^STAGES is .*; allowed are numbers from 1 to 6"):
        stages_named(text, KNOWN)


@pytest.mark.parametrize("text", ["", "soon", "nan", "inf", "-5", "29.9"])
def test_a_budget_is_a_number_of_seconds(text):
    with pytest.raises(ChoiceError, match=r"^BUDGET is"):
        seconds_named(text)
    assert seconds_named("580") == 580


@given(st.floats(0, 2000), st.lists(st.floats(0.1, 20), min_size=1, max_size=8), st.data())
def test_boxes_never_exceed_the_budget_and_pass_on_what_is_left(budget, shares, data):
    left = budget
    for i in range(len(shares)):
        seconds = box(left, shares[i:], least=data.draw(st.sampled_from([0.0, 240.0])))
        assert 0 <= seconds <= left
        assert seconds >= left * shares[i] / sum(shares[i:]) - 1e-6
        left -= seconds * data.draw(st.floats(0, 1))
    assert box(left, shares[-1:]) == pytest.approx(left), "the last one gets all that is left"


def test_boxes_scale_with_the_budget_and_keep_what_is_owed():
    assert [box(budget, [2, 6, 2]) for budget in (100, 1000)] == [20, 200]
    assert box(500, [2, 6, 2], least=240) == 240
    assert box(200, [2, 6, 2], least=240) == 200
    assert box(-3, [1]) == 0
