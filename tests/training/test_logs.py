"""The log on disk goes on after an interruption without repeating; the terminal is quiet where there is none."""

import io
import json

import pytest
from full_disk import PAGE, REASONS
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.utils.tensorboard import SummaryWriter

from afd.experiments.display import Terminal
from afd.files import FileError, FolderError
from afd.training import EpochReport, IntervalReport, json_lines, tensorboard


def interval(number):
    return IntervalReport(1, number, number, 9, {"task": 0.5 / number}, {"task": 0.1})


def epoch(number):
    return EpochReport(1, number, {"task": 0.5}, 0.9, 0.7, 100.0, {"task": 0.1})


def test_json_lines(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    log = json_lines(path)
    log(interval(3))
    log(epoch(4))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["interval", "epoch"]
    assert lines[0]["losses"] == {"task": 0.5 / 3}
    assert lines[1]["robust"] == 0.7


def test_a_resumed_log_does_not_repeat(tmp_path):
    path = tmp_path / "log.jsonl"
    first = json_lines(path)
    for number in (2, 4, 6):
        first(interval(number))
    with path.open("a") as file:
        file.write('{"kind": "interval", "ro')  # killed while it wrote
    second = json_lines(path)
    second(interval(4))
    second(interval(6))
    assert [json.loads(line)["global_step"] for line in path.read_text().splitlines()] == [2, 4, 6]


def test_a_full_disk_leaves_no_half_line(disk):
    path = disk.folder / "log.jsonl"
    log = json_lines(path)
    log(interval(2))
    line = path.read_bytes()
    whole = line * ((PAGE - 10) // len(line))  # the next line does not fit into the page
    path.write_bytes(whole)
    with disk.full(), pytest.raises(FileError, match=f"cannot write {path}: {REASONS}"):
        log(interval(4))
    assert path.read_bytes() == whole
    log(interval(6))
    assert json.loads(path.read_bytes()[len(whole) :])["global_step"] == 6


def test_a_log_that_cannot_be_begun_leaves_nothing(disk):
    log, scalars = json_lines(disk.folder / "log.jsonl"), tensorboard(disk.folder)
    with disk.full():
        for callback in (log, scalars):
            with pytest.raises(FileError, match=f"cannot write .*: {REASONS}"):
                callback(interval(1))
    assert disk.files() == []
    for callback in (log, scalars):
        callback(interval(2))
    assert len(disk.files()) == 2


def test_a_resumed_log_on_a_full_disk_keeps_its_lines(disk):
    path = disk.folder / "log.jsonl"
    first = json_lines(path)
    for number in (2, 4):
        first(interval(number))
    before = path.read_bytes()
    with disk.full(), pytest.raises(FileError, match=f"cannot write {path}: {REASONS}"):
        json_lines(path)(interval(4))
    assert path.read_bytes() == before


@pytest.mark.parametrize("callback", [json_lines, tensorboard])
def test_a_folder_that_is_a_file_is_named(tmp_path, callback):
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match="file is a file; it must be a folder"):
        callback(tmp_path / "file" / "log.jsonl" if callback is json_lines else tmp_path / "file")(interval(1))


def scalars_in(folder):
    read = EventAccumulator(str(folder)).Reload()
    return {name: [(one.step, one.value) for one in read.Scalars(name)] for name in read.Tags()["scalars"]}


def test_tensorboard_reads_what_was_written(tmp_path):
    log = tensorboard(str(tmp_path))
    for report in (interval(2), interval(4), epoch(4)):
        log(report)
    found = scalars_in(tmp_path)
    assert found["loss/task"] == [(2, 0.25), (4, 0.125)]
    assert found["validation/natural"] == [(4, pytest.approx(0.9))]
    assert found["epoch/lr/task"] == [(4, pytest.approx(0.1))]


def test_tensorboard_reads_the_same_as_from_its_own_writer(tmp_path):
    mine, theirs = tensorboard(tmp_path / "mine"), SummaryWriter(str(tmp_path / "theirs"), purge_step=2)
    for report in (interval(2), interval(4)):
        mine(report)
        for kind, values in (("loss", report.losses), ("lr", report.learning_rates)):
            for name, value in values.items():
                theirs.add_scalar(f"{kind}/{name}", value, report.global_step)
    theirs.close()
    assert scalars_in(tmp_path / "mine") == scalars_in(tmp_path / "theirs")
    kinds = []
    for name in ("mine", "theirs"):
        (file,) = (tmp_path / name).iterdir()
        events = EventFileLoader(str(file)).Load()
        kinds.append([(one.step, one.file_version, one.session_log.status, one.summary.value) for one in events])
    assert str(kinds[0]) == str(kinds[1])


def test_a_resumed_run_hides_what_came_after_its_checkpoint(tmp_path):
    first = tensorboard(tmp_path)
    for number in (2, 4, 6):
        first(interval(number))
    second = tensorboard(tmp_path)
    second(interval(4))
    assert scalars_in(tmp_path)["loss/task"] == [(2, 0.25), (4, 0.125)]


def test_tensorboard_on_a_full_disk_is_one_error_and_leaves_whole_records(disk, capfd):
    log = tensorboard(disk.folder)
    log(interval(1))
    (file,) = disk.folder.iterdir()
    written = [1]

    def fill():
        for number in range(2, 100):
            log(interval(number))
            written.append(number)

    with disk.full(), pytest.raises(FileError, match=f"cannot write {file}: {REASONS}"):  # when its page is full
        fill()
    log(interval(200))
    assert [step for step, _ in scalars_in(disk.folder)["loss/task"]] == [*written, 200]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_drawn_on_terminals_only(terminal):
    out = io.StringIO()
    with Terminal(Console(file=out, force_terminal=terminal, width=100), 3, "digits afd") as callback:
        callback(interval(4))
        callback(epoch(9))
    text = out.getvalue()
    assert ("━" in text) is terminal
    assert "digits afd   1/3" in text
    assert "natural 90.00%  robust 70.00%  100 images/s" in text
