"""What is shown while a run is at work: where it is, how fast, how long it will take; and that nobody else is told."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

from afd.attacks import PGDSettings
from afd.errors import InputTypeError
from afd.experiments.display import Terminal, duration
from afd.methods import Natural
from afd.runtime import Group
from afd.training import EpochReport, IntervalReport, Trainer, json_lines
from afd.training.callbacks import LossTracker
from afd.training.validation import shared_accuracy


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Shown:
    """A terminal, or a log, and the time; `lines` are those that are there to stay."""

    def __init__(self, epochs=3, terminal=False, width=200):
        self.clock, self.out = Clock(), io.StringIO()
        console = Console(file=self.out, force_terminal=terminal, width=width, color_system=None)
        self.terminal = Terminal(console, epochs, "digits afd", self.clock)

    def batches(self, count, seconds, images=100):
        for _ in range(count):
            self.clock.now += seconds
            self.terminal.moved(images)

    def bar(self):
        console = Console(file=io.StringIO(), width=100, color_system=None)
        console.print(self.terminal._drawn())
        return console.file.getvalue().rstrip("\n").split("\n")

    @property
    def lines(self):
        return [line.strip() for line in self.out.getvalue().splitlines()]


def epoch(number):
    return EpochReport(number, 10 * number, {"task": 0.5}, 0.9, 0.7, 100.0, {"task": 0.1})


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"), (35.2, "35 s"), (59.4, "59 s"), (59.6, "1 min"), (89, "1 min"), (4 * 60, "4 min"),
        (59.6 * 60, "1 h 00 min"), (2 * 3600 + 5 * 60, "2 h 05 min"), (27 * 3600, "27 h 00 min"),
    ],
)  # fmt: skip
def test_times_are_said_as_people_say_them(seconds, said):
    assert duration(seconds) == said


def test_a_log_gets_a_line_after_some_seconds_and_then_one_a_minute():
    shown = Shown()
    with shown.terminal as terminal:
        terminal.began("training", 1, 0, 100, lambda: {"task": 2.5})
        shown.batches(4, 1.0)
        assert shown.lines == []
        shown.batches(1, 1.0)
        left = "left: epoch 2 min, all epochs 5 min (validation not counted yet)"
        assert shown.lines == [f"digits afd   1/3  training  5/100  task 2.5000  100 images/s  {left}"]
        shown.batches(59, 1.0)
        assert len(shown.lines) == 1
        shown.batches(1, 1.0)
        assert len(shown.lines) == 2
        assert "training  65/100" in shown.lines[1]
        assert "left: epoch 35 s, all epochs 4 min" in shown.lines[1]


def test_a_line_of_an_epoch_counts_as_one():
    shown = Shown()
    with shown.terminal as terminal:
        terminal.began("training", 1, 0, 10)
        shown.batches(1, 2.0)
        terminal(epoch(1))
        terminal.began("training", 2, 0, 100)
        shown.batches(29, 2.0)
        assert len(shown.lines) == 1
        shown.batches(1, 2.0)
        assert [line[:16] for line in shown.lines] == ["digits afd   1/3", "digits afd   2/3"]


def one_epoch(shown, number):
    """30 s of training, 10 s of validation, 20 s of it under attack."""
    for work, total, seconds in (("training", 30, 1.0), ("validation", 5, 2.0), ("validation under attack", 5, 4.0)):
        shown.terminal.began(work, number, 0, total)
        shown.batches(total, seconds)
    shown.terminal(epoch(number))


def test_the_time_left_counts_validation_once_it_is_known():
    shown = Shown(epochs=4)
    terminal = shown.terminal
    terminal.began("training", 1, 0, 30)
    assert terminal._left() == ""  # nothing is known
    shown.batches(10, 1.0)
    assert terminal._left() == "left: epoch 20 s, all epochs 2 min (validation not counted yet)"
    one_epoch(shown, 1)
    terminal.began("training", 2, 0, 30)
    assert terminal._left() == "left: epoch 1 min, all epochs 3 min"  # 60 s an epoch
    shown.batches(20, 1.0)
    assert terminal._left() == "left: epoch 40 s, all epochs 3 min"  # 160 s
    terminal.began("validation", 2, 0, 5)
    shown.batches(2, 2.0)
    assert terminal._left() == "left: epoch 26 s, all epochs 2 min"
    terminal.began("validation under attack", 2, 0, 5)
    shown.batches(4, 4.0)
    assert terminal._left() == "left: epoch 4 s, all epochs 2 min"
    shown.clock.now += 3
    assert terminal._left() == "left: epoch 1 s, all epochs 2 min"  # it passes while a batch is at work
    shown.clock.now += 50
    assert terminal._left() == "left: epoch 0 s, all epochs 2 min"


def test_the_test_and_the_drawing_are_shown():
    shown = Shown(epochs=1)
    one_epoch(shown, 1)
    shown.terminal.began("drawing", None, 0, None)
    assert shown.bar()[0].startswith("digits afd  drawing")
    shown.terminal.began("test under PGD-40", None, 0, 40)
    shown.batches(1, 61.0)
    assert shown.lines[-1] == "digits afd  test under PGD-40  1/40  1.6 images/s  left: 40 min"
    assert "40" in shown.bar()[0]


def test_the_speed_is_that_of_the_last_minute():
    shown = Shown()
    shown.terminal.began("training", 1, 0, 1000)
    shown.batches(1, 300.0)  # something was compiled
    shown.batches(10, 1.0)
    early = shown.terminal.work.speed[0]
    shown.batches(60, 1.0)
    assert early < 0.05
    assert shown.terminal.work.speed == pytest.approx((1.0, 100.0), rel=0.05)


def test_a_resumed_run_begins_where_it_is():
    shown = Shown(epochs=5, terminal=True)
    shown.terminal.began("training", 3, 40, 50)
    first, *_ = shown.bar()
    assert first.startswith("digits afd   3/5  training")
    assert first.endswith("40/50")
    assert first.count("━") > 20  # four fifths of it
    shown.batches(5, 1.0)
    assert shown.terminal._left() == "left: epoch 5 s, all epochs 2 min (validation not counted yet)"


def test_validation_without_a_length_is_known_from_the_second_time_on():
    shown = Shown()
    shown.terminal.began("training", 1, 0, 10)
    shown.batches(10, 1.0)
    shown.terminal.began("validation", 1, 0, None)
    shown.batches(5, 2.0)
    assert shown.terminal._left() == ""
    shown.terminal(epoch(1))
    shown.terminal.began("training", 2, 0, 10)
    assert shown.terminal._left() == "left: epoch 20 s, all epochs 40 s"


def test_losses_are_looked_at_once_a_second_on_a_terminal_and_for_its_lines_in_a_log():
    for terminal, expected in ((True, 10), (False, 1)):
        shown, looks = Shown(terminal=terminal), []
        shown.terminal.began("training", 1, 0, 1000, lambda looks=looks: (looks.append(1), {"task": 1.0})[1])
        shown.batches(1000, 0.01)
        assert len(looks) == pytest.approx(expected, abs=1)


def test_losses_of_the_last_interval_stand_until_there_are_new_ones():
    shown, now = Shown(terminal=True), {}
    shown.terminal.began("training", 1, 0, 100, lambda: now)
    shown.terminal(IntervalReport(1, 5, 5, 100, {"task": 0.75}, {}))
    shown.batches(2, 1.0)
    assert shown.bar()[1].startswith("task 0.7500  100 images/s")
    now["task"] = 0.5
    shown.batches(2, 1.0)
    assert shown.bar()[1].startswith("task 0.5000")
    shown.terminal.began("validation", 1, 0, 4)
    shown.batches(1, 1.0)
    assert shown.bar()[1].startswith("100 images/s")


def test_a_quiet_console_is_told_nothing():
    shown = Shown(terminal=True)
    shown.terminal.console.quiet = True
    with Terminal(shown.terminal.console, 3, "digits afd", shown.clock) as terminal:
        assert terminal.live is None
        terminal.began("training", 1, 0, 9)
        shown.clock.now += 100
        terminal.moved(1)
    assert shown.out.getvalue() == ""


def test_a_terminal_that_cannot_redraw_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    shown = Shown(terminal=True)
    with shown.terminal as terminal:
        terminal.began("training", 1, 0, 9)
        shown.batches(1, 6.0)
    assert shown.lines[0].startswith("digits afd   1/3  training  1/9")
    assert len(shown.lines) == 1


def test_a_peek_changes_nothing():
    meter = LossTracker(Group())
    assert meter.peek() == {}
    for value in (1.0, 2.0, 3.0):
        meter.add({"task": torch.tensor(value), "features": torch.tensor(2 * value)})
    assert meter.peek() == {"task": 2.0, "features": 4.0}
    assert meter.peek(steps=2) == {"task": 2.5, "features": 5.0}
    assert meter.read() == {"task": 2.0, "features": 4.0}
    assert meter.peek() == {}
    assert meter.sums == {"task": 6.0, "features": 12.0}


# --- What a trainer tells --------------------------------------------------------------------------------------------


class Told:
    """A `Progress` that writes down what it is told."""

    def __init__(self):
        self.begun, self.images, self.losses = [], [], []

    def began(self, work, epoch, done, total, losses=None):
        self.begun.append((work, epoch, done, total))
        self.peek = losses

    def moved(self, images):
        self.images.append(images)
        if self.peek is not None:
            self.losses.append(self.peek())


BATCHES = [(torch.rand(8, 4), torch.arange(8) % 2) for _ in range(3)]


def trainer(told=None, **settings):
    torch.manual_seed(0)
    method = Natural(validation_attack=PGDSettings(eps=0.1, alpha=2 / 255, steps=1))
    return Trainer(nn.Linear(4, 2), method, progress=told, **settings)


def test_a_trainer_tells_of_every_batch():
    told = Told()
    trainer(told, epochs=2).fit(BATCHES, BATCHES[:2])
    works = [("training", 3), ("validation", 2), ("validation under attack", 2)]
    assert told.begun == [(work, epoch, 0, total) for epoch in (1, 2) for work, total in works]
    assert told.images == [8] * (2 * (3 + 2 + 2))
    assert all(losses["task"] > 0 for losses in told.losses)
    assert len(told.losses) == 6


def test_reports_and_weights_are_the_same_whether_anything_is_shown_or_not(tmp_path):
    logs, weights = [], []
    for number, told in enumerate((None, Told())):
        path = tmp_path / f"{number}.jsonl"
        one = trainer(told, epochs=2, log_every=2, callbacks=[json_lines(path)])
        one.fit(BATCHES, BATCHES)
        weights.append(one.model.weight)
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        logs.append([{key: value for key, value in entry.items() if "per_second" not in key} for entry in entries])
    assert logs[0] == logs[1]
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("wrong", "told"), [(True, "a bool"), (Told, "a type"), (print, "a builtin_function_or_method")]
)
def test_something_else_in_its_place_is_named(wrong, told):
    with pytest.raises(
        InputTypeError, match=f"progress is {told}; it must be an object with the methods began and moved"
    ):
        trainer(wrong)


def test_a_resumed_trainer_tells_where_it_is(tmp_path):
    first = trainer(epochs=2, folder=tmp_path, log_every=1)
    first.callbacks = [lambda report: first.stop() if report.global_step == 4 else None]
    first.fit(BATCHES, BATCHES)
    told = Told()
    trainer(told, epochs=2, folder=tmp_path, resume="auto").fit(BATCHES, BATCHES)
    assert told.begun[0] == ("training", 2, 1, 3)
    assert len(told.images) == 2 + 3 + 3


def test_validation_calls_after_each_batch_and_may_be_ended_there():
    class EnoughError(Exception):
        pass

    seen = []

    def each(images):
        seen.append(images)
        if len(seen) == 2:
            raise EnoughError

    with pytest.raises(EnoughError):
        shared_accuracy(nn.Linear(4, 2), BATCHES, None, Group(), each=each)
    assert seen == [8, 8]


def test_a_real_terminal_shows_losses_speed_and_time_left_before_the_first_report(tmp_path):
    pty = pytest.importorskip("pty")
    words = [sys.executable, "-m", "afd", "train", "--width", "4", "--attack-steps", "40", "--eval-steps", "40"]
    words += ["--epochs", "3", "--batch-size", "64", "--log-every", "100000", "--out", str(tmp_path / "run")]
    leader, follower = pty.openpty()
    child = subprocess.Popen(
        words, stdout=follower, stderr=follower, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    )
    os.close(follower)
    told = b""
    while True:
        try:
            read = os.read(leader, 65536)
        except OSError:  # the terminal is closed
            break
        if not read:
            break
        told += read
    assert child.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", told.decode())
    before = text[: text.index("natural ")]
    assert re.search(r"1/3  training .*\d+/21", before)
    assert re.search(r"task \d\.\d+  discriminator", text)
    assert re.search(r"images/s", before)
    assert re.search(r"left: epoch \d+ s, all epochs \d+ (s|min)", text)
    assert "validation under attack" in text
    assert "test under PGD-40" in text


def test_under_torchrun_one_process_shows(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "from torch import nn\n"
        "from afd.methods import Natural\n"
        "from afd import processes\n"
        "from afd.training import Trainer\n"
        "class Told:\n"
        "    def began(self, work, *others): self.moved(work)\n"
        "    def moved(self, what): print(f'{self.rank} {what}\\n', end='', flush=True)\n"
        "batches = [(torch.rand(8, 4), torch.arange(8) % 2) for _ in range(2)]\n"
        "trainer = Trainer(nn.Linear(4, 2), Natural(), progress=Told())\n"
        "Told.rank = trainer.group.rank\n"
        "trainer.fit(batches, batches)\n"
        "del trainer\n"
        "processes.leave()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.splitlines() == ["0 training", "0 16", "0 16", "0 validation", "0 8", "0 8"], ran.stderr[-2000:]
