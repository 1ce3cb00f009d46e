"""With torch and numpy alone the library works; what needs an extra says so in one line, with the command to add it."""

import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from afd import installation

ROOT = Path(__file__).parents[1]
BLOCKED = f"""
import sys
for name in {[module for modules in installation.EXTRAS.values() for module in modules]!r}:
    sys.modules[name] = None  # as if it were not installed
"""


def run(code, *words, folder=ROOT):
    """A child in which no package of an extra can be imported."""
    script = BLOCKED + f"sys.argv[1:] = {list(map(str, words))!r}\n" + textwrap.dedent(code)
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    child = [sys.executable, "-c", script]
    return subprocess.run(child, capture_output=True, text=True, check=False, cwd=folder, env=environment)


def test_the_messages_name_the_extras_that_there_are():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == installation.DISTRIBUTION
    assert {line.split(">")[0] for line in project["dependencies"]} == {"torch", "numpy"}
    for extra, modules in installation.EXTRAS.items():
        named = {line.split(">")[0] for line in project["optional-dependencies"][extra]}
        assert named - {"afd-torch[train]"} == {installation.PACKAGES.get(module, module) for module in modules}
    assert {"bench", "all", "test", "lint"} <= project["optional-dependencies"].keys()


def test_the_library_trains_and_attacks_with_torch_and_numpy_alone(tmp_path):
    ran = run(
        """
        import torch, afd
        from afd import Trainer, attacks, methods, nn
        from afd.data import Batches, Images
        from afd.evaluation import accuracy
        from afd.training import json_lines, load_weights, save_weights

        images = Images(torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8), torch.arange(40) % 4, 255.0, 4, "mine")
        model = nn.build_model("convnet", (1, 8, 8), 4, 2)
        game = methods.AFD(attack=attacks.PGDSettings(eps=0.1, alpha=0.05, steps=2), validation_attack="pgd-1")
        folder = sys.argv[1]
        trainer = Trainer(model, game, folder=folder, callbacks=[json_lines(folder + "/l.jsonl")])
        trainer.fit(Batches(images, 20, shuffle=True), Batches(images, 20))
        Trainer(model, game, folder=folder, resume=folder + "/last.pt").fit(
            Batches(images, 20, shuffle=True), Batches(images, 20))
        save_weights(folder + "/model.pt", model)
        load_weights(folder + "/model.pt", model)
        print(accuracy(model, Batches(images, 20), attacks.APGD(model, eps=0.1, steps=2)) >= 0)
        """,
        tmp_path / "run",
    )
    assert (ran.stdout, ran.returncode) == ("True\n", 0), ran.stderr
    assert (tmp_path / "run" / "last.pt").is_file()


COMMANDS = ["train", "evaluate", "compare --methods at", "bench", "curves x", "info", "", "--help", "train --help"]
MODULES = ["afd.demo", "afd.bench"]


def test_every_command_without_its_extra_ends_in_one_line():
    """All in one child, which imports torch once."""
    ran = run(
        """
        import runpy
        from afd import cli
        commands, modules = map(eval, sys.argv[1:])
        for words in commands:
            print(cli.main(words.split()))
        for module in modules:
            try:
                runpy.run_module(module, run_name="__main__")
            except SystemExit as ended:
                print(ended.code)
        """,
        COMMANDS,
        MODULES,
    )
    assert ran.stdout.split() == ["2"] * len(COMMANDS + MODULES), ran.stderr
    told = ran.stderr.splitlines()
    assert len(told) == len(COMMANDS + MODULES)
    for line in told:
        assert ": error: " in line
        assert line.endswith("which is not installed; add it with: pip install 'afd-torch[train]'")


NEEDY = {
    "from afd import data; data.load('digits')": "the data set digits needs scikit-learn",
    "from afd.training import tensorboard; tensorboard('x')": "the callback tensorboard needs tensorboard",
    "from afd.experiments.train import train": "afd.config needs tyro",
    "from afd.experiments.display import plot_curves": "the picture of learning curves needs matplotlib",
    "from afd.evaluation.folder import evaluate_to_folder": "the pictures of an evaluation needs matplotlib",
    "from afd import data; data.load('mnist')": "--data-root, or root= in Python) needs pooch",
}


def test_what_needs_an_extra_in_python_names_it():
    ran = run(
        """
        from afd.installation import ExtraMissingError
        for code in eval(sys.argv[1]):
            try:
                exec(code)
            except ExtraMissingError as error:
                print(error)
        """,
        list(NEEDY),
    )
    told = ran.stdout.splitlines()
    assert len(told) == len(NEEDY), ran.stderr
    for line, expected in zip(told, NEEDY.values(), strict=True):
        assert f"{expected}, which is not installed; add it with: pip install 'afd-torch[train]'" in line


def test_the_version_needs_nothing_at_all():
    ran = run("sys.modules['torch'] = sys.modules['numpy'] = None\nfrom afd.__main__ import main; main()", "--version")
    assert (ran.returncode, ran.stdout.split()[0]) == (0, "afd"), ran.stderr


def test_importing_the_package_imports_no_torch_and_yet_shows_all_names():
    ran = run(
        """
        import afd
        print("torch" in sys.modules, "numpy" in sys.modules, afd.__version__ != "", "Trainer" in dir(afd))
        from afd import *
        print(Trainer.__name__, attacks.PGD.__name__, data.Batches.__name__, afd.evaluation.accuracy.__name__)
        print({name for name in afd.__all__ if not hasattr(afd, name)}, hasattr(afd, "nonsense"))
        """
    )
    assert ran.stdout == "False False True True\nTrainer PGD Batches accuracy\nset() False\n", ran.stderr


def test_a_package_that_is_there_and_fails_is_told_from_one_that_is_missing(tmp_path, monkeypatch):
    (tmp_path / "brittle.py").write_text("import nothing_of_that_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        installation.ExtraMissingError, match=r"x needs brittle, which is installed but fails with Module"
    ):
        installation.require("brittle", "x")
    told = "x needs a package, which is installed but fails with ValueError: MPLBACKEND"
    with pytest.raises(installation.ExtraMissingError, match=told), installation.needed_by("x"):
        raise ValueError("MPLBACKEND")
    assert (
        installation.how_to_add("art", "adversarial-robustness-toolbox") == "pip install adversarial-robustness-toolbox"
    )
    assert installation.how_to_add("foolbox") == "pip install 'afd-torch[evaluate]'"
