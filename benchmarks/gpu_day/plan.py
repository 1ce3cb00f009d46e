"""What a day consists of: its steps, for a machine and its data; which of them are asked for; how many epochs fit."""

import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_day import DayError, results

AFD = {"torch", "numpy", "matplotlib", "rich"}  # what benchmarks import; `import afd` imports torch and numpy of them
COMMAND_LINE = {*AFD, "tyro", "docstring_parser", "tensorboard", "sklearn", "tomli_w"}  # and what train and evaluate do
TESTS = {*COMMAND_LINE, "hypothesis", "pytest", "xdist", "pytest_benchmark", "pytest_timeout"}
MODULES = {1: AFD, 2: TESTS, 3: AFD, 4: AFD, 5: {*AFD, "pyautoattack"}, 6: {*COMMAND_LINE, "PIL"}}
PEERS = "eager,eager-tf32,eager-bf16,torchattacks,foolbox,pyautoattack"
ATTACKS = f"attacks attack=pgd,apgd norm=Linf steps=10 against={PEERS}"
FEW = f"{ATTACKS} model=lenet batch=8 steps=2 repeats=1"  # for a few slow cores
METHODS = "methods methods=trades,at,afd,trades+awp,mart,fgsm-rs,free"
CIFAR10 = "--model resnet18 --width 64 --eps 8/255 --attack-steps 10"
ALLOWED = "numbers from 1 to 6, each once, as in 1,2,4:128 (steps of that name)"
TINY = "--model convnet --width 2 --attack-steps 1 --eval-steps 1"


@dataclass(frozen=True)
class Step:
    """A few commands with one purpose, run one after the other while they end well."""

    stage: int
    name: str
    commands: Sequence[str]  # with {folder} for the step's own; none where they mean nothing without a GPU
    read: Callable[[Path, str], results.Reading] | None = results.documents  # what that folder and the log say
    cap: float = 60  # seconds, at most
    share: float = 0  # of the time left, beside the shares of the steps that follow; by default the cap
    note: str = ""  # must stand beside every figure


def steps(data: Path | None, architecture: str) -> list[Step]:
    """All of them, for a GPU of that architecture (as in "90") or smaller ones for none; the last take what is left."""
    python, gpu, device = shlex.quote(sys.executable), bool(architecture), "cuda" if architecture else "cpu"
    smoke = f"{python} benchmarks/smoke.py --device {device} --out {{folder}}/smoke.json"
    install = f"{python} -c 'import sys, gpu_day.module; gpu_day.module.install(*sys.argv[1:])'"
    pytest = f"env OMP_NUM_THREADS=2 {python} -m pytest -o addopts= --import-mode=importlib --strict-markers -v"
    pytest += f" --benchmark-disable --timeout=120 --dist loadfile -n {6 if gpu else 2} --junitxml={{work}}/logs/"
    small = f"{pytest}small.xml -m 'not slow and not gpu' tests/ops/test_backend.py tests/ops/test_checks.py"
    profile = "ncu --clock-control none --metrics gpu__time_duration.sum,launch__registers_per_thread --csv"
    profile += f" --kernel-name-base mangled --kernel-name regex:afd --launch-count 60 {smoke}"

    def bench(stage: int, name: str, on_gpu: str, on_cpu: str, cap: float = 60) -> Step:
        words = f"{on_gpu if gpu else on_cpu} device={device} out={{folder}}/{name}.json"
        return Step(stage, name, [f"{python} -m afd.bench {words}"], cap=cap)

    def watched(tool: str) -> Step:
        sanitize = f"env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool {tool} --kernel-name kns=afd"
        sanitize += " --report-api-errors no --target-processes all"
        planted = f"nvcc -arch=sm_{architecture} -o {{folder}}/planted benchmarks/gpu_day/planted.cu"
        commands = [planted, f"{sanitize} {{folder}}/planted", f"{sanitize} {smoke}"]
        return Step(2, tool, commands if gpu else [], results.sanitizer, 75)

    return [
        Step(1, "build", [f"{install} {{work}} {{wheels}} '{architecture}' {{folder}}/module.json"], cap=240),
        Step(2, "smoke", [smoke], cap=40),
        Step(2, "tests-gpu", [*([] if gpu else [small]), f"{pytest}gpu.xml -m 'gpu and not slow'"], results.tests, 120),
        watched("memcheck"),
        watched("racecheck"),
        bench(3, "kernels-cifar", "kernels sizes=cifar repeats=30 against=eager",
              "kernels sizes=cifar ops=pgd_step,spectral_norm repeats=2 against=eager"),
        bench(3, "kernels-imagenet", "kernels sizes=imagenet repeats=30 against=eager",
              "kernels sizes=imagenet ops=random_start repeats=1 against=eager"),
        bench(3, "discriminator", "discriminator repeats=30 against=plain,parametrized",
              "discriminator repeats=2 against=plain,parametrized", cap=30),
        bench(4, "attacks-resnet18-128", f"{ATTACKS} model=resnet18 batch=128 repeats=15", FEW, 150),
        bench(5, "methods-resnet18", f"{METHODS} case=resnet18 repeats=5",
              f"{METHODS} case=small batch=8 steps=2 repeats=1", 75),
        *training(data, python, device),
        Step(2, "ncu", [f"sh -c '\"$@\" || echo no counters here' sh {profile}"] if gpu else [], None, 30, share=5),
    ]  # fmt: skip


def training(folder: Path | None, python: str, device: str) -> list[Step]:
    """Real training with `--graph`, for as many epochs as fit: one, to know the pace; all; and what it is worth."""
    held, first = {path.name for path in folder.iterdir()} if folder else set(), list[Step]()
    name, root, note = "digits", "", "digits, for want of CIFAR-10 in DATA"
    if "cifar-10-batches-bin" in held:
        name, root, note = "cifar10", "--data-root {data}", ""
    elif "cifar10-jpeg" in held:
        name, root, note = "cifar10", "--data-root {work}/cifar10-unpack", "CIFAR-10 (JPEG copy)"
        first = [Step(6, "cifar10-unpack", [f"{python} {{data}}/unpack_cifar10.py {{folder}}"], None, share=120)]
    network = TINY if device == "cpu" else CIFAR10 if name == "cifar10" else ""
    train = f"{python} -m afd train --data {name} {root} {network} --device {device} --graph"
    train += " --lr-schedule one-cycle --precision auto --overwrite --out {folder} --epochs "
    judge = f"{python} -m afd evaluate {{work}}/{name}-train/best.pt --protocol quick --device {device}"
    judge += f" --out {{folder}} --images {1000 if device == 'cuda' else 16}"
    return [
        *first,
        Step(6, f"{name}-pace", [f"{train}1"], results.training, 90, 150, note),
        Step(6, f"{name}-train", [f"{train}{{epochs}}"], results.training, 3600, 200, note),
        Step(6, f"{name}-evaluate", [judge], note=note),
    ]


def chosen(text: str, known: list[Step]) -> list[Step]:
    """The build, and the steps of "1,4:128": of whole stages, or those with a word in their names; else a DayError."""
    asked: dict[int, str] = {}
    for part in text.replace(" ", "").split(","):
        number, colon, word = part.partition(":")
        names = [step.name for step in known if str(step.stage) == number]
        if not names or int(number) in asked or (colon and not word):
            raise DayError(f"STAGES is {text!r}, where {part!r} cannot be used; allowed are {ALLOWED}")
        if not any(word in name for name in names):
            there = f"the steps of stage {number} are {', '.join(names)} with this DATA"
            raise DayError(f"STAGES asks for {part}, but {there}")
        asked[int(number)] = word
    return [step for step in known if step.name == "build" or (step.stage in asked and asked[step.stage] in step.name)]


def epochs(box: float, pace: dict[str, Any]) -> int:
    """Epochs that fit into a box, by the record of the step that trained one; 1 if it did not."""
    if "global_step" not in pace.get("figures", {}):
        return 1
    epoch: float = pace["figures"]["global_step"] * 128 / pace["figures"]["images_per_second"]
    rest: float = max(0.0, pace["seconds"] - epoch)  # start and test, and, with a fifth of it, an epoch's validation
    return max(1, min(100, math.floor((0.85 * box - rest) / (epoch + rest / 5))))
