"""Radii are the fractions that were asked for."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.errors import InputError
from afd.evaluation.attacks import Epsilon, ascending


@pytest.mark.parametrize(
    ("given_as", "exact", "printed"),
    [
        ("8/255", Fraction(8, 255), "8/255"),
        (" 0.031", Fraction(31, 1000), "0.031"),
        (0.3, Fraction(3, 10), "0.3"),
        ("16/255", Fraction(16, 255), "16/255"),
        ("0", Fraction(0), "0"),
        ("400", Fraction(400), "400"),
        ("1/3", Fraction(1, 3), "85/255"),
        ("1/7", Fraction(1, 7), "1/7"),
    ],
)
def test_a_radius_is_exact(given_as, exact, printed):
    radius = Epsilon.of(given_as)
    assert radius.exact == exact
    assert str(radius) == printed
    assert radius.as_json() == {"fraction": str(exact), "float": float(exact), "text": printed}


def test_the_papers_0_031_is_not_8_255():
    assert Epsilon.of("0.031") != Epsilon.of("8/255")
    assert float(Epsilon.of("8/255")) == 8 / 255


@given(st.fractions(min_value=0, max_value=1000))
def test_what_is_printed_names_the_same_radius(exact):
    assert Epsilon.of(str(Epsilon(exact))).exact == exact


@pytest.mark.parametrize("wrong", ["", "x", "1/0", "nan", "inf", "-0.1", float("inf")])
def test_no_radius(wrong):
    with pytest.raises(InputError, match="eps is"):
        Epsilon.of(wrong)


@pytest.mark.parametrize("wrong", [["0.2", "0.1"], ["0.1", "0.1"], ["8/255", "0.03"]])
def test_radii_must_ascend(wrong):
    with pytest.raises(InputError, match="radii must ascend"):
        ascending(wrong)


def test_no_radii():
    with pytest.raises(InputError, match="eps is empty"):
        ascending([])


def test_ascending_radii_are_kept():
    assert list(map(str, ascending(["0", "8/255", 0.1]))) == ["0", "8/255", "0.1"]
