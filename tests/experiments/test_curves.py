"""Learning curves: what of a run's log ends up in the picture."""

import os
import re

import pytest
from full_disk import REASONS
from matplotlib.figure import Figure
from matplotlib.image import imread

from afd.cli import main
from afd.errors import InputError
from afd.experiments import display
from afd.files import FileError
from afd.training import EpochReport, IntervalReport, json_lines


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, as they are."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *told, **more: (figures.append(figure), save(figure, *told, **more))
    )
    return figures


def write(folder, robust, losses=("task", "discriminator", "features"), epochs=2, interval=True):
    log = json_lines(folder / "log.jsonl")
    for epoch in range(1, epochs + 1):
        values = {name: (number + 1) / epoch for number, name in enumerate(losses)}
        for done in (1, 4) if interval else ():
            log(IntervalReport(epoch, 4 * (epoch - 1) + done, done, 4, values, {"task": 0.1 / epoch}))
        log(EpochReport(epoch, 4 * epoch, values, 0.5 + epoch / 10, robust, 9.0, {"task": 0.1 / epoch}))
    return folder


def lines(axes):
    return [[(float(x), float(y)) for x, y in line.get_xydata()] for line in axes.get_lines()]


def test_panels_hold_what_was_logged(tmp_path, drawn):
    runs = {"a": write(tmp_path / "a", 0.25), "b": write(tmp_path / "b", 0.5, epochs=3)}
    display.plot_curves(tmp_path / "new" / "curves.png", runs)
    (figure,) = drawn
    accuracy, *losses, rate = figure.axes
    assert [axes.get_title() for axes in losses] == ["cross-entropy", "discriminator's loss", "features' loss"]
    assert lines(accuracy)[:2] == [[(1, 60), (2, 70)], [(1, 25), (2, 25)]]
    assert len(lines(accuracy)[2]) == 3
    assert lines(losses[1])[0] == [(0.25, 2), (1, 2), (1.25, 1), (2, 1)]
    assert lines(rate)[0] == [(0.25, 0.1), (1, 0.1), (1.25, 0.05), (2, 0.05)]
    legend = [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert legend[:2] == ["a, clean: 70.0% at the end", "a, under attack: 25.0% at the end"]
    low, high = accuracy.get_ylim()
    assert low < 25
    assert high > 80
    assert imread(tmp_path / "new" / "curves.png").std() > 0.05


def test_natural_training_has_fewer_panels_and_lines(tmp_path, drawn):
    both = {"natural": write(tmp_path / "n", None, ["task"]), "afd": write(tmp_path / "a", 0.5, interval=False)}
    display.plot_curves(tmp_path / "curves.png", {"natural": both["natural"]})
    assert len(drawn[0].axes) == 3
    assert len(lines(drawn[0].axes[0])) == 1
    display.plot_curves(tmp_path / "curves.png", both)
    accuracy, task, discriminator, *_ = drawn[1].axes
    assert [len(lines(axes)) for axes in (accuracy, task, discriminator)] == [3, 2, 1]
    assert lines(task)[1] == [(1, 1), (2, 0.5)]  # no intervals: one point an epoch


def test_command(tmp_path, capsys):
    folder, out = write(tmp_path / "run", 0.5), tmp_path / "picture.png"
    assert main(["curves", str(folder), f"other={folder}", "--out", str(out)]) == 0
    assert out.stat().st_size > 10_000
    for words, message in [
        ([str(tmp_path)], f"there is no log.jsonl in {tmp_path}"),
        ([str(folder), f"run={folder}"], "of which two are called alike; write NAME=FOLDER"),
        ([], "runs is empty"),
    ]:
        assert main(["curves", *words, "--out", str(out)]) == 2
        assert message in capsys.readouterr().err


def test_what_cannot_be_drawn_is_named(tmp_path):
    with pytest.raises(InputError, match="runs is empty"):
        display.plot_curves(tmp_path / "curves.png", {})
    folder = write(tmp_path / "run", 0.5, epochs=0)
    folder.mkdir()
    (folder / "log.jsonl").write_text('{"kind": "inter')
    with pytest.raises(InputError, match=r"log.jsonl holds no finished epoch; there is nothing to draw yet"):
        display.plot_curves(tmp_path / "curves.png", {"run": folder})


@pytest.mark.parametrize("content", ["words\n", "3\n", '{"kind": "epoch"}\n', "\n", "[1]\n", "\x00\xff"])
def test_a_file_that_is_no_log_is_named(tmp_path, content):
    folder = write(tmp_path / "run", 0.5)
    with (folder / "log.jsonl").open("a", encoding="latin-1") as file:
        file.write(content)
    with pytest.raises(FileError, match=r"log\.jsonl is no log of a run: its line 7 is no report$"):
        display.plot_curves(tmp_path / "curves.png", {"run": folder})
    with pytest.raises(FileError, match="is no log of a run"):  # nor is it gone on with, which would discard the rest
        write(folder, 0.5)
    assert len((folder / "log.jsonl").read_bytes().splitlines()) == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a="], "a run is 'a=', without a folder"),
        ([""], "a word is ''; it must not be empty"),
        (["x" * 300], "File name too long"),
        (["loop"], "a run is loop: Too many levels of symbolic links"),
        (["run", "--out", "pipe"], "out is pipe, which is a device or pipe"),
        (["run", "--out", "run"], "out is run, which is a folder"),
        (["run", "--out", "x" * 300], "File name too long"),
        (["run", "--out="], "out is ''; it must not be empty"),
    ],
)
def test_a_path_that_can_be_none_is_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "run").mkdir()
    write(tmp_path / "run", 0.5)
    os.mkfifo(tmp_path / "pipe")
    assert main(["curves", *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert (tmp_path / "pipe").is_fifo()


def test_a_format_that_there_is_not_is_one_line(tmp_path, capsys):
    folder = write(tmp_path / "run", 0.5)
    assert main(["curves", str(folder), "--out", str(tmp_path / "picture.mp3")]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"afd: error: the picture is to be '{tmp_path / 'picture.mp3'}'; its name may end in .")
    assert told.count("\n") == 1
    assert main(["curves", str(folder), "--out", str(tmp_path / "picture.pdf")]) == 0
    assert (tmp_path / "picture.pdf").read_bytes().startswith(b"%PDF")


def test_a_picture_on_a_full_disk_is_one_line(tmp_path, disk, capsys):
    folder, out = write(tmp_path / "run", 0.5), disk.folder / "picture.png"
    with disk.full():
        assert main(["curves", str(folder), "--out", str(out)]) == 2
    told = capsys.readouterr().err
    assert re.fullmatch(f"afd: error: cannot write {out}: {REASONS}\n", told)
    assert disk.files() == []


def test_paths_may_be_strings(tmp_path):
    folder = write(tmp_path / "run", 0.5)
    display.plot_curves(str(tmp_path / "curves.png"), {"run": str(folder)})
    assert (tmp_path / "curves.png").is_file()
