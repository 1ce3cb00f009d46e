"""The README's Python example runs as printed, its commands exist, and its tables are what was measured."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_python_example_trains_a_robust_network():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    printed = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=True).stdout
    robust = float(re.fullmatch(r"PGD-40: ([\d.]+)%\n", printed).group(1))
    assert robust > 40


def test_the_two_commands_come_first():
    commands = re.findall(r"^make \S+", README, re.MULTILINE)
    assert commands[:2] == ["make demo", "make test"]
    assert README.index("make demo") < 100


def test_every_make_target_and_option_in_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    config = (ROOT / "afd" / "config.py").read_text().replace("_", "-")
    for option in set(re.findall(r"afd train.* --([a-z-]+)", README)) - {"help"}:
        assert option in config, option


@pytest.fixture(scope="module")
def tables():
    """The script that writes README's tables."""
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_of_measurements_is_what_its_json_says(tables):
    assert len(tables.BLOCK.findall(README)) >= 5
    assert tables.renewed(README) == README


def test_a_figure_that_changes_in_the_json_changes_in_the_readme(tables, tmp_path):
    results = shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results")
    names = {file for _, files, _ in tables.BLOCK.findall(README) for file in files.split()}
    for name in sorted(names):
        kept = (results / name).read_text()
        changed = json.loads(kept)
        for case in changed["cases"].values():
            for candidate in case["candidates"].values():
                candidate["figures"] = {
                    key: value * 3 + 1 if isinstance(value, int | float) else value
                    for key, value in candidate["figures"].items()
                }
        (results / name).write_text(json.dumps(changed))
        renewed = tables.renewed(README, results)
        assert renewed != README, name
        assert tables.renewed(renewed, results) == renewed
        assert tables.BLOCK.sub("", renewed) == tables.BLOCK.sub("", README)
        (results / name).write_text(kept)


def test_evaluations_too(tables, tmp_path):
    results = shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results")
    blocks = tables.EVALUATED.findall(README)
    assert [kind for _, kind, _, _ in blocks] == ["table 1", "table 2", "autoattack"]
    for name in {file for _, _, files, _ in blocks for file in files.split()}:
        changed = json.loads((results / name).read_text())
        changed["subject"]["name"] += "!"
        (results / name).write_text(json.dumps(changed))
    renewed = tables.renewed(README, results)
    assert all(f"| {name}! " in renewed for name in ("natural", "AFD-WGAN", "AFD-DCGAN"))
    assert renewed.replace("!", "") == README.replace("!", "")


def test_every_benchmark_command_in_the_readme_is_understood(tables):
    from afd import cli

    commands = re.findall(r"^afd bench (.+?)(?:  +#.*)?$", README, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        made = cli.tyro.cli(cli.Work, args=command.split(), registry=cli.NUMBERS)
        assert made.name == command.split()[0]
