"""Where reports go: numbered folders that nothing overwrites, one process's at a time, and none that is left empty."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from afd.cli import main
from afd.errors import InputError
from afd.evaluation import protocol as protocols
from afd.evaluation import runner
from afd.evaluation.attacks import Epsilon, ascending
from afd.evaluation.folder import FolderError, evaluate_to_folder
from afd.evaluation.model import Model, UnusableModelError
from afd.evaluation.outcome import read_results
from afd.evaluation.store import Output, StateError, agreed
from afd.experiments.comparison.results import comparison_folder
from afd.files import FolderLock
from afd.runtime import Group

REPORT = ["curves.png", "examples.png", "report.html", "results.json"]


@pytest.fixture
def run(natural, images, tmp_path, monkeypatch):
    """evaluate_to_folder() of a few images, in a folder of its own to which all paths are relative."""
    monkeypatch.setattr(protocols, "QUICK_QUERIES", 2)
    monkeypatch.chdir(tmp_path)
    eps = Epsilon.of("0.15")
    protocol = protocols.named("quick", data="digits", norm="Linf", epsilons=ascending(["0.15"]), trained_at=eps)

    def evaluated(out=None, *, model=natural, **options):
        output = (
            out if isinstance(out, Output) else Output(None if out is None else Path(out), options.pop("over", False))
        )
        taken = images.take(torch.arange(20))
        evaluate_to_folder(Model("natural", "test", model), taken, protocol, output, batch_size=10, **options)
        return str(output.folder)

    return evaluated


@pytest.fixture
def interrupted(run, monkeypatch):
    """The same, stopped in its second batch."""

    def stop(self, number):
        if number:
            raise KeyboardInterrupt
        return batch(self, number)

    batch = runner.Runner.batch

    def evaluated(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(runner.Runner, "batch", stop)
            with pytest.raises(KeyboardInterrupt):
                run(*arguments, **options)

    return evaluated


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_evaluations_are_numbered_and_latest_leads_to_the_newest(run):
    assert [run(), run()] == ["runs/evaluations/0001", "runs/evaluations/0002"]
    assert names("runs/evaluations") == ["0001", "0002", "latest"]
    assert names("runs/evaluations/latest") == REPORT
    assert Path("runs/evaluations/latest").resolve().name == "0002"


def test_an_unfinished_one_of_the_same_kind_goes_on_where_it_is(run, interrupted):
    interrupted()
    assert run(seed=1) == "runs/evaluations/0002"
    assert "state" in names("runs/evaluations/0001")
    assert run() == "runs/evaluations/0001"
    assert names("runs/evaluations/0001") == REPORT
    assert run() == "runs/evaluations/0003"


def test_one_that_another_process_is_at_is_left_alone(run, interrupted):
    interrupted()
    with elsewhere("runs/evaluations/0001"):
        assert run() == "runs/evaluations/0002"
    assert names("runs/evaluations/0001") == ["state"]


class elsewhere:  # noqa: N801  (reads as a word)
    """Another process that uses a folder."""

    CODE = """
import sys
from pathlib import Path
from afd.files import FolderLock
with FolderLock(Path(sys.argv[1])).held():
    print("held", flush=True)
    sys.stdin.read()
"""

    def __init__(self, folder):
        environment = {**os.environ, "PYTHONPATH": str(Path(runner.__file__).parents[2])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.CODE, folder], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self):
        assert self.process.stdout.readline() == b"held\n"

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def test_a_folder_in_use_is_refused(run):
    with elsewhere("out"), pytest.raises(FolderError, match=r"out is in use by another process \(process \d+ on"):
        run("out")
    assert run("out") == "out"


@pytest.mark.parametrize("out", ["a/b/c", None, "mine"])
def test_no_empty_folder_is_left_by_an_error(run, monkeypatch, out):
    def broken(*_, **__):
        raise RuntimeError("no")

    Path("mine").mkdir()
    monkeypatch.setattr("afd.evaluation.store.Store.__init__", broken)
    with pytest.raises(RuntimeError, match="no"):
        run(out)
    with pytest.raises(InputError, match="seed is -1"):
        run(out, seed=-1)
    assert names(".") == ["mine"]
    assert names("mine") == []


def test_a_folder_of_something_else_is_refused_and_keeps_what_it_holds(run):
    Path("thesis").mkdir()
    Path("thesis/text.tex").write_text("years of work")
    Path("file").touch()
    with pytest.raises(FolderError, match="exists and holds no evaluation"):
        run("thesis")
    with pytest.raises(FolderError, match="which is a file; it must be a folder"):
        run("file")
    with pytest.raises(FolderError, match="a part of the path is a file"):
        run("file/out")
    run("thesis", over=True)
    assert names("thesis") == [*REPORT, "text.tex"]


def test_a_folder_that_cannot_be_written_to_is_named(run):
    with pytest.raises(FolderError, match=r"/proc/nowhere cannot be made"):
        run("/proc/nowhere")


def test_overwrite_deletes_nothing_before_all_checks_have_passed(run, natural):
    run("out")
    before = Path("out/results.json").read_bytes()
    with pytest.raises(InputError, match="batch-size is 0"):
        evaluate_to_folder(Model("n", "t", natural), None, None, Path("out"), batch_size=0, overwrite=True)
    with pytest.raises(UnusableModelError, match="does not take"):
        run("out", model=torch.nn.Linear(3, 10), over=True)
    assert Path("out/results.json").read_bytes() == before
    run("out", over=True, seed=1)
    assert read_results(Path("out"))["settings"]["seed"] == 1


def test_overwrite_goes_on_with_this_very_evaluation_and_discards_another(run, interrupted):
    interrupted("out")
    kept = next(Path("out/state").glob("pgd-20.*"))
    moment = kept.stat().st_mtime_ns
    interrupted("out", over=True)
    assert kept.stat().st_mtime_ns == moment
    with pytest.raises(StateError, match="differs in settings"):
        run("out", seed=1)
    run("out", over=True, seed=1)
    assert read_results(Path("out"))["settings"]["seed"] == 1


@pytest.mark.parametrize("content", [b"", b'{"weights": "3'])
def test_a_damaged_state_is_one_line_and_may_be_discarded(run, interrupted, content):
    interrupted("out")
    Path("out/state/run.json").write_bytes(content)
    with pytest.raises(StateError, match=r"run\.json is damaged, so that nobody can say which evaluation"):
        run("out")
    run("out", over=True)
    assert names("out") == REPORT


def test_a_kill_while_the_state_is_removed_is_tidied_up(run, monkeypatch):
    run("whole")
    with monkeypatch.context() as patch:
        patch.setattr("afd.evaluation.store._remove_state", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("out")
    for kept in list(Path("out/state").glob("*.pt"))[:3]:
        kept.unlink()
    assert names("out") == [*REPORT, "state"]
    run("out")
    assert names("out") == REPORT
    with pytest.raises(FolderError, match="holds a finished evaluation"):
        run("out")


def interrupt(*_):
    raise KeyboardInterrupt


def test_kept_images_are_no_unfinished_evaluation(run):
    run("out", keep_images=True)
    assert "state" in names("out")
    with pytest.raises(FolderError, match="holds a finished evaluation"):
        run("out", keep_images=True)
    assert run(keep_images=True) != run(keep_images=True)


def test_a_models_settings_tell_evaluations_apart_whose_weights_are_the_same(run, interrupted, natural, monkeypatch):
    interrupted("out")
    monkeypatch.setattr(natural, "normalize", False)
    with pytest.raises(StateError, match="differs in network"):
        run("out")


def test_what_dead_processes_left_half_written_goes(run, interrupted):
    interrupted("out")
    dead = subprocess.Popen(["true"])
    dead.wait()
    for group in ("out", "out/state"):
        Path(group, f".results.json.{dead.pid}.part").touch()
    run("out")
    assert names("out") == REPORT


def test_several_processes_take_the_leaders_folder_or_its_refusal(monkeypatch):
    first, second = (Group(rank, 2) for rank in (0, 1))
    box = []

    def broadcast(answer, src):
        assert src == 0
        box.append(answer[0])
        answer[0] = box[0]

    def refuse():
        raise FolderError("out is a file")

    monkeypatch.setattr("torch.distributed.broadcast_object_list", broadcast)
    for group, decide in ((first, refuse), (second, never)):
        with pytest.raises(FolderError, match="out is a file"):
            agreed(group, decide)
    box.clear()
    assert agreed(first, lambda: "runs/1") == agreed(second, never) == "runs/1"


def never():
    raise AssertionError("only the leading process decides")


def test_comparisons_have_folders_of_their_own(run):
    run()
    with comparison_folder(None, overwrite=False) as folder:
        (folder / "tables.md").touch()
    assert str(folder) == "runs/compare/0001"
    assert Path("runs/compare/latest/tables.md").exists()
    with pytest.raises(FolderError, match="holds a table of results"), comparison_folder(folder, overwrite=False):
        pass

    def intrude():
        try:
            with comparison_folder(folder, overwrite=True):
                said.append("taken")
        except FolderError as error:
            said.append(str(error))

    said = []
    with FolderLock(folder).held():
        other = threading.Thread(target=intrude)
        other.start()
        other.join()
    assert said == ["runs/compare/0001 is in use by another run of this process; name another folder"]


def test_overwrite_needs_a_folder_that_was_named(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "x.pt", "--overwrite"]) == 2
    assert "the numbered folders are never overwritten" in capsys.readouterr().err
    assert names(".") == []
