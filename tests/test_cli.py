"""`afd info`, help texts and the demo."""

import dataclasses
import inspect
import os
import re
import sys
import warnings
from pathlib import Path

import pytest

from afd import config
from afd.attacks import ATTACKS, CaptureWarning
from afd.bench.attacks import AgreementBench, AttackBench
from afd.bench.autoattack import AutoAttackBench
from afd.bench.base import Benchmark
from afd.bench.kernels import DiscriminatorBench, KernelBench
from afd.bench.methods import MethodsBench
from afd.cli import main
from afd.methods import METHODS
from afd.ops import backend

ROOT = Path(__file__).parent.parent


def test_a_warning_of_ours_is_a_line_and_others_are_as_ever(capsys, monkeypatch):
    def warns():
        warnings.warn("rounds are slow", CaptureWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
        return []

    monkeypatch.setattr(backend, "lines", warns)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda *told: sys.stderr.write(warnings.formatwarning(*told[:4])))
        before = warnings.formatwarning
        assert main(["info"]) == 0
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == "afd: warning: rounds are slow"
    assert second.endswith("UserWarning: something else")
    assert __file__ in second
    assert warnings.formatwarning is before


def test_info_says_what_serves_which_tensor(capsys):
    assert main(["info"]) == 0
    lines = dict(re.split(r"\s{2,}| (?=\S+$)", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    text = " ".join(f"{name}: {value}" for name, value in lines.items())
    assert "CPU tensors: native" in text
    assert re.search(r"CUDA tensors: (native|reference: \S+)", text)


def helped_by(capsys, *words):
    """What a command says of itself, without its frames."""
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    return " ".join(re.sub(r"[│╭╮╰╯─\n]", " ", capsys.readouterr().out).split())


@pytest.mark.parametrize("group", [config.DataConfig, config.ModelConfig, config.TestConfig, config.RunConfig])
def test_every_option_has_a_help_line(group, capsys):
    helped, source = helped_by(capsys, "train", "natural"), inspect.getsource(group)
    for field in dataclasses.fields(group):
        match = re.search(rf'^    {field.name}: .*\n    """(.+?)"""', source, re.MULTILINE | re.DOTALL)
        assert match, f"{group.__name__}.{field.name} has no docstring"
        assert " ".join(match.group(1).split())[:40] in helped


VALUE = r"(?: (?:\{[^}]*\}(?:\|\w+)?|FLOAT\|P/Q|INT|STR|PATH|\[\S+ \[.*?\]\]))?"  # of an option, as it is shown


@pytest.mark.parametrize("words", [*([name] for name in METHODS), *(["at", "--attack", name] for name in ATTACKS)])
def test_every_option_of_a_method_and_of_its_attack_has_a_help_line(words, capsys):
    _, *told = re.split(r" (?=--[a-z])", helped_by(capsys, "train", *words).partition("show this help message")[2])
    said = {}  # of each option, which other texts may name as well
    for one in told:
        option, text = re.match(rf"--(?:no-)?([a-z0-9-]+){VALUE}(.*)", one).groups()
        said[option] = max(said.get(option, ""), text, key=len)
    assert {"lr", "momentum", "weight-decay", "optimizer", "eps", "data", "out", "config"} <= said.keys()
    assert ("norm" in said) == (words[-1] != "union")  # whose radii say in what balls
    assert ("attack" in said) == (words not in (["natural"], ["free"], ["llr"], ["jarn"]))  # they attack by themselves
    assert ({"eps-l2", "eps-l1", "attack-choice"} <= said.keys()) == (words[-1] == "union")
    assert ("eval-steps" in said) == (words != ["natural"])
    assert ("lr-discriminator" in said) == (words == ["afd"])
    for option, text in said.items():
        assert len(re.findall(r"\w+", text.partition("(default")[0])) > 1, (option, text)


@pytest.mark.parametrize(
    "work", [AttackBench, KernelBench, MethodsBench, DiscriminatorBench, AgreementBench, AutoAttackBench]
)
def test_every_option_of_a_benchmark_has_a_help_line(work, capsys):
    with pytest.raises(SystemExit):
        main(["bench", work.name, "--help"])
    helped = " ".join(re.sub(r"[│\n]", " ", capsys.readouterr().out).split())
    sources = [inspect.getsource(one) for one in work.__mro__ if issubclass(one, Benchmark)]
    offered = [field for field in dataclasses.fields(work) if "Suppress" not in str(field.type)]
    assert {"device", "out", "since"} <= {field.name for field in offered}
    for field in offered:
        found = (re.search(rf'^    {field.name}: .*\n    """(.+?)"""', source, re.M | re.S) for source in sources)
        match = next(filter(None, found), None)
        assert match, f"{work.__name__}.{field.name} has no docstring"
        assert " ".join(match.group(1).split())[:40] in helped


def test_no_command_shows_the_commands(capsys):
    assert main([]) == 2
    told = capsys.readouterr().err
    assert told.startswith("afd: error: the command is missing; allowed are train, plan, evaluate, compare, bench, ")
    with pytest.raises(SystemExit) as shown:
        main(["--help"])
    assert not shown.value.code
    assert "Train a classifier" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attacks", "--attack", "cw"], "afd: error: attack is 'cw'; allowed are pgd, apgd"),
        (["attacks", "--against", "cleverhans"], "afd: error: against is 'cleverhans'; allowed are"),
        (["attacks", "--model", "alexnet"], "afd: error: model is 'alexnet'; allowed are lenet"),
        (["attacks", "--model", "no_such_package:make"], "afd: error: model no_such_package:make cannot be imported"),
        (["kernels", "--ops", "softmax"], "afd: error: ops is 'softmax'; allowed are pgd_step"),
        (["kernels", "--against", "numpy"], "afd: error: against is 'numpy'; allowed are eager, compiled, reference"),
        (["discriminator", "--against", "x"], "afd: error: against is 'x'; allowed are plain, parametrized"),
        (["methods", "--schedules", "never"], "afd: error: schedules is 'never'; allowed are simultaneous, "),
        (["agreement", "--data", ".", "--peer", "nobody"], "afd: error: peer is 'nobody'; allowed are"),
        (["discriminator", "--since", "pyproject.toml"], "afd: error: pyproject.toml is not JSON"),
    ],
)
def test_a_mistake_in_a_benchmark_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["bench", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps is 0"),
        (["--attack", "foo"], "attack is 'foo'"),
        (["--model", "nope"], "model is 'nope'"),
        (["--model", "os:getcwd"], "model os:getcwd returned a str"),
        (["--batch", "0"], "batch is 0"),
        (["--norm", "L7"], "norm is 'L7'"),
        (["--eps", "-1"], "eps is -1"),
        (["--shape", "3", "0", "3"], "shape is 3x0x3"),
        (["--out", ""], "out is ''; it must not be empty"),
        (["--out", "x" * 300], "File name too long"),
        (["--out", "loop"], "out is loop: Too many levels of symbolic links"),
        (["--out", "pipe"], "out is pipe, which is a device or pipe"),
        (["--since", "pipe"], "since is pipe, which is a device or pipe"),
        (["--since", "a\0b"], "a path has no null byte"),
    ],
)
def test_a_mistake_in_a_benchmark_is_found_before_anything_begins(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    assert main(["bench", "attacks", *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("afd: error: ")
    assert message in told.err
    assert told.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop", "pipe"]


def test_a_benchmark_that_ends_before_its_first_case_leaves_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--model", "torch.nn:Flatten", "--shape", "1", "1", "1", "--batch", "1", "--eps", "8"]
    assert main(["bench", "attacks", *words]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_demo_reaches_its_bars(tmp_path):
    """Natural: at least 97% clean without robustness; AFD: at least 97% clean and 70% under PGD-40 at 0.2."""
    from rich.console import Console

    from afd import demo

    curves = demo.run(tmp_path, Console(quiet=True))
    at = demo.EPSILONS.index(0.2)
    assert curves["natural"][at] < 0.2
    assert curves["AFD-WGAN"][0] >= 0.97
    assert curves["AFD-WGAN"][at] >= 0.70
    assert (tmp_path / "curves.png").is_file()
