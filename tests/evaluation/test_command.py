"""`afd evaluate` from the command line: a report from a checkpoint, and what it says to each mistake."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import afd.nn
from afd.checkpoint import save_checkpoint
from afd.cli import main
from afd.config import DataConfig, ModelConfig, TrainConfig
from afd.evaluation import protocol as protocols
from afd.evaluation.outcome import read_results
from afd.presets import method_for

QUICK = ("--images", "60", "--batch-size", "40")


def checkpoint(path, model, method="afd", width=8, data="digits"):
    made = method_for(data, method)
    config = TrainConfig(data=DataConfig(data), model=ModelConfig("convnet", width), method=made).settled()
    discriminator = afd.nn.ProjectionDiscriminator(model.num_features, model.num_classes)
    players = {"discriminator": discriminator.state_dict()} if method == "afd" else {}
    metadata = {"method": method, "config": config.as_json()}
    save_checkpoint(path, {"model": model.state_dict(), "players": players}, metadata)
    return str(path)


@pytest.fixture(autouse=True, scope="module")
def few_queries():
    """Square's queries have their tests elsewhere; here they would only take time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocols, "QUICK_QUERIES", 2)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, robust, natural, few_queries):
    """Checkpoints of a robust and a natural model, and a quick report of the first."""
    folder = tmp_path_factory.mktemp("models")
    checkpoint(folder / "robust.pt", robust)
    checkpoint(folder / "natural.pt", natural, "natural")
    assert (
        main(["evaluate", str(folder / "robust.pt"), "--out", str(folder / "quick"), "--eps", "0.1", "8/51", *QUICK])
        == 0
    )
    return folder


def failed(capsys, *arguments):
    """The one line in which a command fails."""
    assert main(["evaluate", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("afd: error: ")
    assert error.count("\n") == 1
    return error


def test_results_say_everything(folder, robust, images):
    results = read_results(folder / "quick")
    assert results["version"] == 1
    assert results["subject"]["name"] == "AFD-WGAN"
    assert len(results["subject"]["sha256"]) == 64
    assert results["data"] == {
        "name": "digits", "split": "test", "images": "the first 60", "count": 60, "shape": [1, 8, 8], "classes": 10,
    }  # fmt: skip
    assert results["settings"] == {"seed": 0, "batch_size": 40, "processes": 1, "kept_images": False}
    assert set(results["versions"]) == {"afd", "torch", "python"}
    assert results["machine"]["device"].endswith("thread") or results["machine"]["device"].endswith("threads")
    correct = (robust(images.images(torch.arange(60))).argmax(1) == images.labels[:60]).double().mean()
    assert results["clean"] == float(correct)
    pgd = results["attacks"][0]
    assert pgd["settings"] == {"steps": 20}
    assert [point["fraction"] for point in pgd["accuracies"]] == ["1/10", "8/51"]
    assert pgd["accuracies"][1]["float"] == 8 / 51
    assert pgd["accuracies"][0]["text"] == "0.1"
    worst = results["worst_case"]["Linf"]
    assert 0 < worst["40/255"] <= worst["0.1"] <= results["clean"]
    assert {check["verdict"] for check in results["checks"]} <= {"pass", "warn", "fail", "skipped"}
    assert results["features"]["count"] == 128


def test_the_report_is_one_file_that_needs_nothing_else(folder):
    found = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.extend((tag, name, value) for name, value in attributes if name in ("src", "href", "srcset", "data"))
            assert tag != "script"

    text = (folder / "quick" / "report.html").read_text(encoding="utf-8")
    Links().feed(text)
    assert len(found) == 2
    assert all(value.startswith("data:image/png;base64,") for _, _, value in found)
    assert "http" not in re.sub(r"base64,[^\"]+", "", text)
    assert "url(" not in text
    results = read_results(folder / "quick")
    for check in results["checks"]:
        assert check["name"].split()[0] in text
    assert f"{100 * results['clean']:.2f}%" in text
    assert f"<b>{100 * results['worst_case']['Linf']['40/255']:.2f}%</b>" in text
    assert results["subject"]["sha256"] in text


def test_whatever_users_have_named_is_escaped_in_both_reports(folder):
    from afd.evaluation.report import Table, comparison, report

    name = "<script>alert('1')</script>\" & `<b>`"
    results = read_results(folder / "quick")
    results["subject"] |= {"name": name, "source": name, "architecture": name}
    results["surrogate"] = {"source": name}
    results["data"] |= {"name": name, "split": name}
    results["machine"]["device"] = results["versions"][name] = name
    results["attacks"][0] |= {"name": name, "library": name, "settings": {name: name}}
    results["checks"][0] |= {"name": "random outputs", "verdict": "fail", "meaning": name, "unit": name}
    tables = [Table(name, (name, "figure"), ((name, name),), note=name)]
    reports = {
        report(results, folder / "quick", tables): 24,
        comparison([results], folder / "quick", tables): 9,
    }
    for page, times in reports.items():
        said = []

        class Text(HTMLParser):
            def handle_starttag(self, tag, *_):
                assert tag != "script"

            def handle_data(self, data, said=said):
                said.append(data)

        Text().feed(page)
        assert "<script" not in page
        assert "<b>`" not in page
        assert "".join(said).count(name) == times


@pytest.mark.parametrize("name", ["curves.png", "examples.png"])
def test_pictures_show_something(folder, name):
    from matplotlib.image import imread

    picture = imread(folder / "quick" / name)
    assert min(picture.shape[:2]) > 300
    assert picture[..., :3].std() > 0.05


def test_the_same_command_gives_the_same_result(folder, tmp_path):
    command = ["evaluate", str(folder / "robust.pt"), "--out", str(tmp_path / "again"), "--eps", "0.1", "8/51", *QUICK]
    assert main(command) == 0

    def without_times(path):
        results = read_results(path)
        return json.dumps({**results, "attacks": [{**attack, "seconds": 0} for attack in results["attacks"]]})

    assert without_times(tmp_path / "again") == without_times(folder / "quick")


def test_a_function_that_returns_a_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def model():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
        "def few():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))\n"
        "def broken():\n    raise RuntimeError('no weights here')\n"
        "def words():\n    return 'a model'\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "mine:model", "--data", "digits", "--out", "out", *QUICK]) == 0
    results = read_results(Path("out"))
    checks = {check["name"]: check for check in results["checks"]}
    assert checks["training mode"]["verdict"] == "warn"
    assert checks["training mode"]["number"] == 3
    assert results["subject"]["architecture"] == "Sequential"
    assert results["features"] is None
    assert "name it with --data" in failed(capsys, "mine:model", "--out", "b")
    assert "has 3 classes, but data set digits has 10" in failed(capsys, "mine:few", "--data", "digits", "--out", "b")
    assert "RuntimeError: no weights here" in failed(capsys, "mine:broken", "--data", "digits", "--out", "b")
    assert "returned a str" in failed(capsys, "mine:words", "--data", "digits", "--out", "b")
    assert "is a int" in failed(capsys, "mine:number", "--data", "digits", "--out", "b")
    assert "has no 'nothing'" in failed(capsys, "mine:nothing", "--data", "digits", "--out", "b")
    assert "cannot be imported" in failed(capsys, "not.there:model", "--data", "digits", "--out", "b")
    (tmp_path / "failing.py").write_text("1 / 0")
    told = failed(capsys, "failing:model", "--data", "digits", "--out", "b")
    assert "failing:model cannot be imported: ZeroDivisionError" in told


def test_mistakes_are_told_in_one_line(folder, tmp_path, capsys, robust):
    model, out = folder / "robust.pt", tmp_path / "out"
    assert "there is no checkpoint" in failed(capsys, folder / "none.pt", "--out", out)
    assert "model is missing" in failed(capsys, "--out", out)
    assert "radii must ascend" in failed(capsys, model, "--eps", "0.2", "0.1", "--out", out)
    assert "must be at least 0" in failed(capsys, model, "--eps=-0.1", "--out", out)
    assert "a fraction such as 8/255" in failed(capsys, model, "--eps", "lots", "--out", out)
    assert "radius > 0" in failed(capsys, model, "--eps", "0", "--out", out)
    assert "images is 0; the test set of digits has images 1 ... 359" in failed(
        capsys, model, "--images", "0", "--out", out
    )
    assert "images is 360" in failed(capsys, model, "--images", "360", "--out", out)
    assert "its own radii" in failed(capsys, model, "--protocol", "paper", "--eps", "0.1", "--out", out)
    assert "norm L2 has no usual radius" in failed(capsys, model, "--norm", "L2", "--out", out)
    assert "reference is set" in failed(capsys, model, "--reference", "--out", out)
    whole = ("--protocol", "autoattack", "--reference", "--precision", "auto")
    assert "precision is auto, but reference is set; pyautoattack runs in float32" in failed(
        capsys, model, *whole, "--out", out
    )
    assert "transfer-from is set" in failed(capsys, model, "--transfer-from", model, "--out", out)
    assert "batch-size is 0" in failed(capsys, model, "--batch-size", "0", "--out", out)
    assert "device is 'tpu9'" in failed(capsys, model, "--device", "tpu9", "--out", out)
    assert "device is 'meta'" in failed(capsys, model, "--device", "meta", "--out", out)
    assert "eps is 8 in Linf; no two images in [0, 1] are further apart than 1" in failed(
        capsys, model, "--eps", "8", "--out", out
    )
    assert not out.exists()
    for config in (None, {"lr": 0.1}, {"data": {"name": "mine"}}):
        save_checkpoint(tmp_path / "python.pt", {"model": robust.state_dict()}, {"config": config})
        told = failed(capsys, tmp_path / "python.pt", "--data", "digits", "--out", out)
        assert "python.pt does not say which network it holds; name a function that builds it with --model" in told
    other = checkpoint(tmp_path / "other.pt", robust, width=4)
    assert "does not hold the weights of a convnet of width 4 for 1x8x8 images and 10 classes" in failed(
        capsys, other, "--out", out
    )
    root = tmp_path / "none"
    root.mkdir()
    (tmp_path / "words.pt").write_text("no checkpoint")
    assert "damaged or of another kind" in failed(capsys, tmp_path / "words.pt", "--out", out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/dev/zero"], "checkpoint is /dev/zero, which is a device or pipe"),
        (["pipe"], "checkpoint is pipe, which is a device or pipe"),
        (["x" * 300], "File name too long"),
        (["x" * 300 + ":y"], "File name too long"),
        (["loop"], "checkpoint is loop: Too many levels of symbolic links"),
        (["a\0b"], "a path has no null byte"),
        (["odd.pt"], "checkpoint odd.pt is damaged, or no file that torch.save has written"),
        (["odd.pt", "--out", "x" * 300], "out is xxx"),
        (["odd.pt", "--out", "dangling"], "out is dangling, a link that leads nowhere"),
        (["odd.pt", "--out", ""], "out is ''; it must not be empty"),
        (["odd.pt", "--transfer-from="], "transfer-from is ''; it must not be empty"),
        (["os.path:"], "model is 'os.path:'; a function is named as package.module:function"),
        (["made_to_leave:leaves"], "model made_to_leave:leaves failed with SystemExit: go away"),
        (["made_to_leave:lines"], "model made_to_leave:lines failed with ValueError: one two"),
        (["odd.pt", "--model", "made_to_leave:lines"], "failed with ValueError: one two"),
    ],
)
def test_what_can_be_no_model_or_folder_is_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "odd.pt").write_bytes(b"abc" * 100)
    source = "def leaves():\n    raise SystemExit('go\\naway')\n\n\ndef lines():\n    raise ValueError('one\\ntwo')\n"
    (tmp_path / "made_to_leave.py").write_text(source)
    assert message in failed(capsys, *words)
    assert not (tmp_path / "runs").exists()


def test_data_of_another_shape_is_refused(folder, tmp_path, capsys, monkeypatch, splits):
    from afd import data

    big = type(splits.test)(torch.zeros(5, 1, 28, 28, dtype=torch.uint8), torch.arange(5), 255.0, 10, "mnist")
    monkeypatch.setattr(data, "load", lambda *_, **__: data.Splits(big, big, big))
    error = failed(capsys, folder / "robust.pt", "--data", "mnist", "--images", "5", "--out", tmp_path / "out")
    assert "does not take mnist's 1x28x28 images" in error


def test_an_existing_folder_is_refused_unless_told(folder, tmp_path, capsys):
    command = [folder / "natural.pt", "--images", "20", "--out"]
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert "exists and holds no evaluation" in failed(capsys, *command, out)
    assert main(["evaluate", *map(str, command), str(out), "--overwrite"]) == 0
    assert "holds a finished evaluation" in failed(capsys, *command, out)
    assert (out / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    assert "which is a file" in failed(capsys, *command, tmp_path / "file")


def test_an_unfinished_evaluation_of_something_else_is_refused(folder, tmp_path, capsys, monkeypatch):
    from afd.evaluation import runner

    out = tmp_path / "out"
    command = ["evaluate", str(folder / "natural.pt"), "--images", "20", "--out", str(out)]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner.Runner, "note", interrupt)
        assert main(command) == 130
    assert (out / "state").is_dir()
    capsys.readouterr()
    assert "differs in settings" in failed(capsys, *command[1:], "--seed", "1")
    assert main(command) == 0
    assert not (out / "state").exists()


def test_compare_puts_models_side_by_side_with_the_published(folder, tmp_path, capsys):
    pytest.importorskip("foolbox")
    few = ["--protocol", "paper", "--images", "6", "--transfer-from"]
    for name, other in (("robust", "natural"), ("natural", "robust")):
        models = [str(folder / f"{name}.pt"), "--out", str(tmp_path / name)]
        assert main(["evaluate", *models, *few, str(folder / f"{other}.pt")]) == 0
    assert "the model's own weights" in failed(capsys, *models, "--overwrite", *few, folder / "natural.pt")
    results = read_results(tmp_path / "robust")
    assert [attack["name"] for attack in results["attacks"] if attack["role"] == "score"] == [
        "pgd-linf", "pgd-l2", "pgd-l1", "fgsm", "mim", "ddn", "deepfool", "cw",
    ]  # fmt: skip
    assert {point["attack"] for point in results["divergence"]} >= {"pgd-linf", "cw"}
    assert all(0 <= point["distance"] <= 2 for point in results["divergence"])
    assert (tmp_path / "robust" / "divergence.png").exists()
    assert read_results(tmp_path / "natural")["divergence"] == []
    out = tmp_path / "side"
    both = ["compare", "--results", str(tmp_path / "natural"), str(tmp_path / "robust"), "--out", str(out)]
    assert main(both) == 0
    text = (out / "tables.md").read_text(encoding="utf-8")
    clean = f"{100 * results['clean']:.2f}"
    published, _, paired = text.partition("Percentage points more than natural, on the same 6 images")
    rows = [line.split(" | ") for line in published.splitlines() if line.startswith("| AFD-WGAN")]
    assert len(rows) == 2
    assert "| AFD-WGAN | clean | " in paired
    assert rows[0][1] == clean
    assert "-" not in rows[0][1:]
    assert len(rows[1]) == 9
    assert "holds a finished" not in text
    for path in ("curves.png", "report.html"):
        assert (out / path).exists()
    assert main(both) == 2
    assert "holds a table of results" in capsys.readouterr().err
    (out / "tables.md").unlink()  # as a kill leaves it
    assert main(both) == 0
    assert (out / "tables.md").read_text(encoding="utf-8") == text


def test_compare_prints_published_figures_for_mnist(folder):
    from afd.evaluation.report import table_1, table_2

    results = read_results(folder / "quick")
    results["data"]["name"] = "mnist"
    one, two = table_1([results]), table_2([results])
    assert one.ours == two.ours == 1
    assert ("AFD-WGAN (published)", "99.14", "97.68", "97.68", "98.59", "98.71") in one.rows
    assert one.rows[0][2:] == ("-",) * 4
    assert two.rows[-1] == ("AFD-WGAN (published)", "0.92", "0.54", "0.55", "0.9", "0.98", "0.68", "0.63", "0.94")


def test_a_row_as_robustbench_prints_it(folder):
    from afd.evaluation.report import robustbench

    results = read_results(folder / "quick")
    assert robustbench(results) is None
    results["protocol"]["name"] = "autoattack"
    found = robustbench(results)
    text = results["protocol"]["reference"]["text"]
    worst = f"{100 * results['worst_case']['Linf'][text]:.2f}%"
    unreliable = {"pass": "no", "warn": "perhaps", "fail": "yes"}[results["verdict"]]
    clean = f"{100 * results['clean']:.2f}%"
    assert found.rows == (("AFD-WGAN", clean, worst, unreliable, "no", "convnet (width 8)"),)
    assert found.markdown().splitlines()[2].startswith(f"| AFD-WGAN | {clean} | {worst} |")


@pytest.mark.slow
def test_two_processes_find_what_one_finds(folder, tmp_path):
    import os
    import subprocess
    import sys

    options = ["-m", "afd", "evaluate", str(folder / "robust.pt"), "--eps", "0.1", *QUICK]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for launch, out in (([], "one"), (["-m", "torch.distributed.run", "--nproc-per-node", "2"], "two")):
        command = [sys.executable, *launch, *options, "--out", str(tmp_path / out), "--device", "cpu"]
        subprocess.run(command, check=True, env=environment, capture_output=True)
    one, two = (read_results(tmp_path / name) for name in ("one", "two"))
    assert two["settings"]["processes"] == 2
    for key in ("clean", "worst_case", "checks", "features"):
        assert one[key] == two[key]
