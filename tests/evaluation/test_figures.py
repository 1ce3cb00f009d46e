"""Figures that follow from outcomes and features: areas, components, distances, tables."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from afd.errors import InputError
from afd.evaluation.checks import Check, judge, overall, skipped
from afd.evaluation.model import DomainCounter, divergence, feature_summary, principal_components
from afd.evaluation.outcome import normalised_area
from afd.evaluation.plots import plot_curves, plot_examples, plot_sweeps
from afd.evaluation.report import TABLE_1, TABLE_1_COLUMNS, TABLE_2, TABLE_2_COLUMNS, TABLE_2_HEADS
from afd.evaluation.runner import other_batch_size


def test_area_of_the_papers_kind():
    assert normalised_area([0, 0.1, 0.3], [1, 1, 1]) == pytest.approx(1)
    assert normalised_area([0, 0.1, 0.3], [1, 0.5, 0]) == pytest.approx((0.075 + 0.05) / 0.3)
    assert normalised_area([0, 1], [1, 0]) == 0.5


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_area_is_that_of_numpy(accuracies):
    import numpy as np

    radii = [float(i * i) for i in range(len(accuracies))]
    assert normalised_area(radii, accuracies) == pytest.approx(np.trapezoid(accuracies, radii) / radii[-1])


@pytest.mark.parametrize("radii", [[0.1, 0.2], [0, 0.2, 0.1], [0, 0.1, 0.1], [0]])
def test_area_wants_radii_that_ascend_from_zero(radii):
    with pytest.raises(InputError, match="ascend from 0"):
        normalised_area(radii, [1.0] * len(radii))


def test_principal_components_count_directions():
    basis = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    weights = torch.zeros(20, dtype=torch.float64)
    weights[:3] = torch.tensor([3.0, 2.0, 1.0])
    draws = torch.randn(500, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    features = 5 + (draws * weights) @ basis.T
    assert principal_components(features, 0.999999) == 3
    assert principal_components(features, 0.5) == 1
    assert principal_components(features, 0.9) == 2
    assert principal_components(torch.ones(5, 4), 0.99) == 0


class WithFeatures(nn.Module):
    def features(self, x):
        flat = x.flatten(1)
        return torch.cat([flat[:, :1] + 1, flat[:, :1] * 0, flat[:, 20:21]], 1)

    def forward(self, x):
        return self.features(x)


def test_feature_summary_counts_zeros(images):
    found = feature_summary(WithFeatures(), images, 33)
    assert found["count"] == 3
    assert found["never_zero"] == 1
    assert found["always_zero"] == 1
    assert found["components"] == 1
    assert feature_summary(nn.Flatten(), images, 33) is None


def test_divergence_of_perfect_and_of_blind_discriminators():
    perfect = {"judged": 10, "natural": 10, "attacked": 0}, {"judged": 20, "natural": 0, "attacked": 20}
    blind = {"judged": 10, "natural": 5, "attacked": 5}, {"judged": 20, "natural": 10, "attacked": 10}
    assert divergence(*perfect) == 2
    assert divergence(*blind) == 0
    assert divergence({"judged": 4, "natural": 3, "attacked": 1}, {"judged": 4, "attacked": 2}) == pytest.approx(0.5)
    assert divergence(Counter(), perfect[1]) is None


def test_domain_counter_asks_features_and_labels(images):
    class Discriminator(nn.Module):
        def forward(self, z, y):
            assert not self.training
            return z[:, 0] - 1.5 + y

    x = torch.zeros(4, 1, 8, 8)
    counts = DomainCounter(WithFeatures(), Discriminator())(x, torch.tensor([0, 1, 2, 0]))
    assert counts == {"judged": 4, "natural": 2, "attacked": 2}


@pytest.mark.parametrize(
    ("number", "one", "verdict"),
    [
        (0.0, 0, "pass"),
        (0.2, 0, "pass"),
        (0.3, 0, "warn"),
        (1.01, 0, "fail"),
        (2, 2.5, "warn"),
        (float("nan"), 0, "fail"),
    ],
)
def test_verdicts(number, one, verdict):
    check = judge("a", number, "points", allowed=0.2, fails_above=1, meaning="m", one=one)
    assert check.verdict == verdict


def test_the_worst_verdict_counts():
    def of(verdict):
        return Check("a", verdict, 1.0, "", 0.0, "")

    assert overall([of("pass"), skipped("b", "why")]) == "pass"
    assert overall([of("pass"), of("fail"), of("warn")]) == "fail"
    assert overall([of("warn"), of("pass")]) == "warn"
    assert overall([]) == "skipped"


@given(st.integers(1, 2000))
def test_the_second_look_has_another_batch_size(size):
    assert other_batch_size(size) != size
    assert other_batch_size(size) >= 1


def test_published_tables_are_whole():
    assert all(len(row) == len(TABLE_1_COLUMNS) for rows in TABLE_1.values() for row in rows.values())
    assert len(TABLE_2_COLUMNS) == len(TABLE_2_HEADS)
    assert all(len(row) == len(TABLE_2_COLUMNS) for rows in TABLE_2.values() for row in rows.values())
    assert TABLE_1["mnist"]["AFD-WGAN"] == (99.14, 97.68, 97.68, 98.59, 98.71)
    assert TABLE_2["cifar10"]["AFD-WGAN"][0] == 0.56


def test_plot_is_a_png_with_a_line_a_model(tmp_path):
    path = tmp_path / "curves.png"
    plot_curves(path, [0, 0.1], {"natural": [0.9, 0.0], "afd": [0.9, 0.7]}, title="digits", trained_at=0.1)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    from matplotlib.image import imread

    picture = imread(path)
    assert picture.shape[0] > 400
    assert picture[..., :3].std() > 0.01


def test_examples_without_any_say_so(tmp_path):
    from matplotlib.image import imread

    plot_examples(tmp_path / "none.png", [], title="pgd")
    picture = imread(tmp_path / "none.png")
    assert picture[..., :3].min() < 0.5  # words
    assert picture[..., :3].mean() > 0.8


def swept(name, attack, images):
    points = [{"float": 0.1, "accuracy": 0.5}]
    return {
        "subject": {"name": name}, "clean": 0.9, "attacks": [
            {"name": attack, "norm": "Linf", "role": "score", "accuracies": points}
        ], "data": {"name": "digits", "images": images, "split": "test", "classes": 10},
    }  # fmt: skip


def test_the_legend_names_the_models_of_all_panels_and_the_title_images_that_all_share(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("afd.evaluation.plots.save_picture", lambda figure, _: drawn.append(figure))
    for counts in ((60, 60), (60, 100)):
        plot_sweeps(tmp_path / "x.png", [swept("a", "pgd-20", counts[0]), swept("b", "apgd-ce", counts[1])])
    for figure, title in zip(drawn, ("digits, 60 test images; dotted: chance", "digits; dotted: chance"), strict=True):
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
        assert figure.get_suptitle() == title
