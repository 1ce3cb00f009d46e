"""``python -m afd.bench``: words are read as the options are annotated, and a mistake is one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from afd import process
from afd.bench import command
from afd.errors import InputError


def test_words_are_read_as_the_options_are_annotated():
    bench = command.built("attacks", "shape=3,224,224", "eps=0.5", "batch=64", "model=a.b:c", "compare=x/y.json")
    assert (bench.name, bench.shape, bench.eps, bench.batch) == ("attacks", (3, 224, 224), 0.5, 64)
    assert (bench.model, bench.compare, bench.out, bench.steps) == ("a.b:c", Path("x/y.json"), None, 20)
    assert command.built("round", "case=small", "case=resnet18").case == "resnet18", "the last counts"
    assert command.built("attacks", "model=a=b").model == "a=b"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "benchmark is ''; allowed are attacks, discriminator, kernels, round"),
        (["speed"], "benchmark is 'speed'; allowed are attacks, discriminator, kernels, round"),
        (["round", "size=3"], "an option of round is 'size'; allowed are rounds, device, "),
        (["round", "case=vgg"], "case is 'vgg'; allowed are small, resnet18"),
        (["kernels", "rounds"], "rounds is ''; it must be of type int"),
        (["kernels", "rounds=1.5"], "rounds is '1.5'; it must be of type int"),
        (["attacks", "eps=8/255"], "eps is '8/255'; it must be of type float"),
        (["attacks", "shape=3,x,4"], "shape is '3,x,4'; it must be of type "),
    ],
)
def test_a_mistake_is_one_line_and_status_2(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["afd.bench", *words])
    assert process.carry_out(command.asked, "afd.bench") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"afd.bench: error: {said}")


def test_a_benchmark_refuses_what_it_cannot_measure(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["afd.bench", "kernels", "sizes=vast", f"out={tmp_path / 'k.json'}"])
    assert process.carry_out(command.asked, "afd.bench") == 2
    assert capsys.readouterr().err.startswith("afd.bench: error: sizes is 'vast'; allowed are ")
    with pytest.raises(InputError, match=r"^rounds is 0"):
        command.run(command.built("kernels", "rounds=0"), command.Console())
