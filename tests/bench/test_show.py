"""Figures are written for people."""

import pytest
from rich.console import Console

from afd.bench import show
from afd.bench.show import Column


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.345, "12.3 s"), (1.0, "1 s"), (0.0123, "12.3 ms"), (0.000185, "185 µs"), (3e-7, "0.3 µs")]
)
def test_durations(seconds, text):
    assert show.duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(0.5, "50%"), (None, ""), ("bf16", "bf16")])
def test_cells(value, text):
    assert Column("share", "share", "{:.0%}").cell(value) == text


def test_a_table_has_a_row_for_each_candidate_and_a_picture_a_panel_for_each_case(document, tmp_path):
    made = document({"PGD": {"afd": (0.001, 0.002, 0.003), "floor": (1, 1, 1)}, "APGD": {"afd": (1, 2, 3)}})
    console = Console(record=True, width=20)  # narrower than the table, which is printed whole
    show.whole(console, show.table(made, [Column("of floor", "of_floor", "{:.0%}"), Column("missing", "missing")]))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["afd", "2", "ms", "1", "ms", "-", "3", "ms", "50%"] in lines
    assert ["floor", "1", "s", "1", "s", "-", "1", "s", "50%"] in lines
    show.chart(tmp_path / "a.png", made)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
