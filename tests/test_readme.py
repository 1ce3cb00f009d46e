"""The README's Python example runs as printed, its commands exist, and its tables are what was measured."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import comparisons
import pytest

from afd.bench.results import Candidate, Case, Document, DocumentError, Timing
from afd.cli import main
from afd.evaluation.outcome import ResultsError
from afd.methods import METHODS
from afd.metrics import interval

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


def test_every_make_target_and_option_in_the_readme_exists(capsys):
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    shown = set()
    for name in METHODS:
        with pytest.raises(SystemExit):
            main(["train", name, "--help"])
        shown |= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    used = {option for line in re.findall(r"afd train.*", README) for option in re.findall(r" (--[a-z-]+)", line)}
    assert len(used) > 3
    assert used <= shown


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
    assert all(f"| {name}! " in renewed for name in ("natural", "at", "trades", "AFD-WGAN", "AFD-DCGAN"))
    assert renewed.replace("!", "") == README.replace("!", "")


def test_comparisons_too(tables, tmp_path):
    figures = {"natural": (0.99, 0.0), "at": (0.98, 0.88), "afd": (0.98, 0.9)}
    content = comparisons.comparison({name: comparisons.entry(name, [one]) for name, one in figures.items()})
    (tmp_path / "compare-mine.json").write_text(json.dumps(content))
    text = "before <!-- compare: compare-mine.json -->\nold\n<!-- /compare --> after"
    renewed = tables.renewed(text, tmp_path)
    assert "old" not in renewed
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in renewed.splitlines() if line[:1] == "|"]
    assert rows[0][:4] == ["entry", "clean", "PGD-40", "AutoAttack"]
    runs = [one["runs"]["0"]["evaluation"] for one in content["entries"].values()]
    assert [row[0] for row in rows[2:]] == list(figures)
    for column, name in ((1, "clean"), (2, "pgd-40"), (3, "autoattack")):
        for row, one in zip(rows[2:], runs, strict=True):
            low, high = (100 * end for end in interval(1000 * one[name], 1000))
            assert row[column] == f"{100 * one[name]:.2f} ({low:.2f} to {high:.2f})"
    assert "; options for all: `--data mnist --width 8`; [JSON](" in renewed
    assert tables.renewed(renewed, tmp_path) == renewed
    content["entries"]["afd"] = comparisons.waiting("afd")
    (tmp_path / "compare-mine.json").write_text(json.dumps(content | {"finished": False}))
    with pytest.raises(ResultsError, match="is not finished"):
        tables.renewed(text, tmp_path)


def on_gpu(benchmark, cases, **changes):
    """A document of a GPU that nobody has: case -> candidate -> seconds and figures."""
    made = {
        name: Case({}, {who: Candidate(Timing(s, s, s), figures) for who, (s, figures) in one.items()})
        for name, one in cases.items()
    }
    where = ("Imaginary H200", "cuda", 16, {"torch": "2.11"}, None, "2026-01-01T00:00:00+00:00", 20)
    return replace(Document(benchmark, *where, {}, made), **changes)


def device(seconds, host_us, timed="graph", **figures):
    return seconds, {"device_us": seconds * 1e6, "host_us": host_us, "timed": timed, **figures}


def rows(tables, tmp_path, document):
    document.write(tmp_path / "gpu.json")
    table, caption = tables.rendered(["gpu.json"], tmp_path).strip().split("\n\n")
    assert caption.startswith("Imaginary H200, torch 2.11; medians of 20 repeats")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [lines[0], *lines[2:]]


def test_tables_of_a_gpu_show_device_and_host_time_and_graphs(tables, tmp_path):
    cases = {
        "pgd_step Linf 128x3x32x32 fp32": {
            "native": device(2.5e-6, 21.0, share_of_floor=0.9, share_of_copy=0.83),
            "eager": device(12.5e-6, 60.0, over_native=5.0),
        },
        "load_batch 128x3x32x32": {
            "native": device(1.5e-6, 20.0, share_of_floor=0.9, share_of_copy=0.5),
            "eager": device(3e-4, 300.0, "events", over_native=200.0),
        },
        "spectral_linear 128 x 512": {"native": device(4e-5, 200.0, share_of_floor=0.9, share_of_copy=None)},
    }
    assert rows(tables, tmp_path, on_gpu("kernels", cases)) == [
        ["op", "device time", "host time", "of the copy's rate", "over eager PyTorch"],
        ["`pgd_step` L∞ 128x3x32x32 fp32", "2.5 µs", "21 µs", "83%", "5x"],
        ["`load_batch` 128x3x32x32", "1.5 µs", "20 µs", "50%", "2e+02x (no graph)"],
        ["`spectral_linear` 128 x 512", "40 µs", "200 µs", "–", "–"],
    ]
    plain = device(3e-4, 900.0, over_plain=3.75, over_afd=3.0)
    cases = {
        "batch 128, 10 classes": {"afd": device(1e-4, 400.0, over_plain=1.25, over_afd=1.0), "parametrized": plain},
        "power iteration in a CUDA graph": {"afd": device(1.1e-5, 30.0)},
    }
    assert [row[1:] for row in rows(tables, tmp_path, on_gpu("discriminator", cases))] == [
        ["device time", "host time", "of plain layers' time", "faster than torch's parametrisation"],
        ["100 µs", "400 µs", "1.25", "3.00x"],
        ["11 µs", "30 µs", "–", "–"],
    ]
    names = ["released", "afd simultaneous auto", "afd simultaneous auto graph"]
    whole = {name: (0.1 / (i + 1), {"speedup": i + 1.0, "share": 0.25}) for i, name in enumerate(names)}
    outside = {name: (0.025, {"speedup": 2.0, "share": None}) for name in names}
    settings = {"case": "resnet18", "batch": 128, "steps": 10}
    found = rows(tables, tmp_path, on_gpu("step", {"whole": whole, "outside the attack": outside}, settings=settings))
    assert [row[1] for row in found] == ["step", *names]
    assert found[-1] == ["", "afd simultaneous auto graph", "3.00x", "2.00x", "25%"]


def test_what_is_no_table_is_refused(tables, tmp_path):
    made = on_gpu("kernels", {"pgd_step Linf x": {"native": device(1e-6, 1.0)}})
    for name, document in {
        "cut": replace(made, finished=False), "gpu": made, "cpu": replace(made, device_type="cpu"),
    }.items():  # fmt: skip
        document.write(tmp_path / f"{name}.json")
    with pytest.raises(DocumentError, match=r"cut\.json is not finished: it holds 1 cases of a run that was cut off"):
        tables.rendered(["cut.json"], tmp_path)
    with pytest.raises(DocumentError, match="are of kernels on cpu, kernels on cuda; a table is of one benchmark"):
        tables.rendered(["gpu.json", "cpu.json"], tmp_path)


def test_every_benchmark_command_in_the_readme_is_understood(tables):
    from afd.cli import benchmarks
    from afd.options import parsed

    commands = re.findall(r"^afd bench (.+?)(?:  +#.*)?$", README, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        made = parsed(benchmarks(), "bench", command.split(), "")
        assert made.name == command.split()[0]
