"""What STAGES mean, what fits, and that afd understands every command of the plan, on a GPU and without one."""

import inspect
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_day import module, plan

from afd.bench import attacks, baselines, kernels, methods
from afd.bench.base import built

ROOT = Path(__file__).parents[2]
PLACES = dict.fromkeys(("folder", "work", "wheels", "data"), "'/a b'") | {"epochs": 3}
ALLOWED = {
    "kernels": {"sizes": kernels.SIZES, "ops": kernels.OPS, "against": kernels.AGAINST},
    "attacks": {"attack": attacks.ATTACKS, "norm": attacks.NORMS, "against": baselines.BASELINES},
    "discriminator": {"against": kernels.BESIDE["cuda"]},
    "methods": {"methods": methods.METHODS, "schedules": methods.SCHEDULES, "precisions": methods.PRECISIONS},
}
KINDS = (attacks.AttackBench, kernels.DiscriminatorBench, kernels.KernelBench, methods.MethodsBench)
CHILD = """import functools, json, sys
from afd import attacks, data, evaluation, methods, nn, training
print(*{name.partition(".")[0] for name in sys.modules})
from afd.bench import __main__, attacks, kernels, methods
print(*{name.partition(".")[0] for name in sys.modules})
from afd import cli
from afd.evaluation import command
from afd.experiments import train
train.train = command.run = lambda config: print(type(config).__name__)
print(*{cli.main(line) for line in json.loads(sys.argv[1])})
print(*{name.partition(".")[0] for name in sys.modules})"""
FIRST = {"": "digits-pace", "cifar10-jpeg": "cifar10-unpack", "cifar-10-batches-bin": "cifar10-pace"}  # by data


@pytest.fixture(params=["90", ""], ids=["gpu", "cpu"])
def plans(request, tmp_path):
    """The steps, by the data that there are."""
    for name in FIRST:
        (tmp_path / "of" / name / name).mkdir(parents=True)
    return {name: plan.steps(tmp_path / "of" / name if name else None, request.param) for name in FIRST}


def words(steps, *start):
    """The commands that begin so, each word by word."""
    lines = [shlex.split(line.format_map(PLACES)) for step in steps for line in step.commands]
    return [line for line in lines if line[: len(start)] == list(start)]


def test_stages_are_numbers_with_words_and_begin_with_the_module(plans):
    for text, names in {"5, 1": ["methods-resnet18"], "4:128": ["attacks-resnet18-128"]}.items():
        assert [step.name for step in plan.chosen(text, plans[""])] == ["build", *names]
    for name, first in FIRST.items():
        assert [step.name for step in plan.chosen("6", plans[name])][1] == first


@pytest.mark.parametrize(("box", "epochs"), [(10, 1), (60, 2), (100, 5), (200, 12), (1e6, 100)])
def test_epochs_fit_beside_start_and_test(box, epochs):
    """One takes 8 s within a run of 28 s: 20 s of start and test, and a validation of at most 4 s."""
    assert plan.epochs(box, {"seconds": 28.0, "figures": {"global_step": 100, "images_per_second": 1600.0}}) == epochs
    assert plan.epochs(box, {}) == plan.epochs(box, {"figures": {}}) == 1, "nothing was measured"


def test_every_step_has_a_name_and_runs_files_that_there_are(plans, request):
    steps = plans["cifar10-jpeg"]
    assert len({step.name for step in steps}) == len(steps) >= 14
    needy = set() if "[gpu]" in request.node.name else {"memcheck", "racecheck", "ncu"}
    assert {step.name for step in steps if not step.commands} == needy
    ours = {word for line in words(steps) for word in line if word.startswith(("benchmarks/", "tests/"))}
    assert {"benchmarks/smoke.py"} <= ours == {path for path in ours if (ROOT / path).is_file()}
    assert "gpu and not slow" in words([step for step in steps if step.name == "tests-gpu"])[-1]
    inspect.signature(module.install).bind(*words(steps[:1])[0][3:])
    assert all(line[-1] == "/a b/smoke.json" for line in words(steps, "sh")), "a shell in a shell takes spaces, too"


def test_a_benchmark_understands_its_words_and_none_compiles(plans):
    lines = words(plans[""], sys.executable, "-m", "afd.bench")
    for _, _, _, name, *told in lines:
        bench = built(KINDS, [name, *told])
        assert str(bench.out).startswith("/a b/")
        for key, allowed in ALLOWED[name].items():
            assert set(getattr(bench, key).split(",")) <= {word for word in allowed if not word.startswith("compile")}
    assert len(lines) == 5


def test_afd_understands_train_and_evaluate_and_stages_ask_for_what_their_programs_import(plans):
    """One child reads all lines, stopping before anything is done."""
    lines = [line[3:] for steps in plans.values() for line in words(steps, sys.executable, "-m", "afd")]
    child = [sys.executable, "-c", CHILD, json.dumps(lines)]
    ran = subprocess.run(child, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    library, bench, *told, afd = ran.stdout.splitlines()
    others = {"torch", "numpy", "matplotlib", "rich", "tensorboard", "tyro", "tomli_w", "docstring_parser"}
    others |= {"sklearn", "pooch", "scipy", "foolbox", "pyautoattack", "torchattacks", "torchvision"}
    assert others & set(library.split()) == {"torch", "numpy"}
    assert others & set(bench.split()) == plan.AFD
    assert others & set(afd.split()) - {"scipy"} == plan.COMMAND_LINE
    assert sorted(told) == ["0", *["EvaluateConfig"] * 3, *["TrainConfig"] * 6], ran.stderr
