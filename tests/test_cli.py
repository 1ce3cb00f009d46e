"""`afd info`, help texts and the demo."""

import dataclasses
import re

import pytest

from afd import demo
from afd.cli import main
from afd.config import AttackConfig, DataConfig, MethodConfig, ModelConfig, TrainConfig


def test_info_says_what_serves_which_tensor(capsys):
    assert main(["info"]) == 0
    lines = dict(re.split(r"\s{2,}| (?=\S+$)", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    text = " ".join(f"{name}: {value}" for name, value in lines.items())
    assert "CPU tensors: native" in text
    assert re.search(r"CUDA tensors: (native|reference: \S+)", text)


@pytest.mark.parametrize("group", [DataConfig, ModelConfig, AttackConfig, MethodConfig, TrainConfig])
def test_every_option_has_a_help_line(group, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    helped = " ".join(re.sub(r"[│\n]", " ", capsys.readouterr().out).split())
    source = __import__("inspect").getsource(group)
    nested = {"data", "model", "attack", "method"} if group is TrainConfig else set()
    for field in dataclasses.fields(group):
        if field.name in nested:
            continue
        match = re.search(rf'^    {field.name}: .*\n    """(.+?)"""', source, re.MULTILINE | re.DOTALL)
        assert match, f"{group.__name__}.{field.name} has no docstring"
        assert " ".join(match.group(1).split())[:40] in helped


def test_no_command_shows_the_commands(capsys):
    with pytest.raises(SystemExit):
        main([])
    out = capsys.readouterr()
    assert "train" in out.out + out.err


@pytest.mark.slow
def test_the_demo_reaches_its_bars(tmp_path):
    """Natural: at least 97% clean without robustness; AFD: at least 97% clean and 70% under PGD-40 at 0.2."""
    from rich.console import Console

    curves = demo.run(tmp_path, Console(quiet=True))
    at = demo.EPSILONS.index(0.2)
    assert curves["natural"][at] < 0.2
    assert curves["AFD-WGAN"][0] >= 0.97
    assert curves["AFD-WGAN"][at] >= 0.70
    assert (tmp_path / "curves.png").is_file()
