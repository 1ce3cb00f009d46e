"""`fit` again: after a stop, an error or Ctrl-C, for more epochs; what may change on resume and what best.pt holds."""

import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

from afd import Trainer
from afd.attacks import PGD, PGDSettings
from afd.errors import AfdError, InputError
from afd.files import FolderError
from afd.methods import AFD, Natural
from afd.methods.attacking import GivenAttack
from afd.training import CheckpointError, EpochReport, StoppedError, load_checkpoint
from afd.training.callbacks import IntervalReport

EPOCHS, BATCHES = 3, 4
PGD_1 = PGDSettings(eps=0.1, alpha=0.05, steps=1)


def batches(count=BATCHES):
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(6, 16, generator=generator), torch.randint(4, (6,), generator=generator)) for _ in range(count)]


def shuffled():
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 6, shuffle=True)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 4))


def trainer(folder=None, **settings):
    defaults = {"epochs": EPOCHS, "log_every": 1, "method": AFD(attack=PGD_1, validation_attack=None)}
    return Trainer(net(), folder=folder, **{**defaults, **settings})


def constant(_progress):
    return 1.0


def weights(of):
    return {name: tensor.clone() for name, tensor in of.network.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def undisturbed():
    run = trainer()
    run.fit(shuffled(), batches())
    return weights(run)


# --- fit again ------------------------------------------------------------------------------------------------------


class Once:
    """A callback that does something in one step, the first time."""

    def __init__(self, at, what):
        self.at, self.what = at, what

    def __call__(self, report):
        if self.at == report.global_step and isinstance(report, IntervalReport):
            self.at = None
            self.what()


@pytest.mark.parametrize("at", [1, 4, 6, 11])
@pytest.mark.parametrize("kept", [False, True])
def test_after_a_stop_it_goes_on_with_the_next_batch(at, kept, tmp_path, undisturbed):
    run = trainer(tmp_path if kept else None)
    run.callbacks = [Once(at, run.stop)]
    run.fit(shuffled(), batches())
    assert run.position.global_step == at
    torch.rand(7)  # what others draw in between is not the run's
    run.fit(shuffled(), batches())
    assert run.position.global_step == EPOCHS * BATCHES
    assert len(run.history) == EPOCHS
    assert same(weights(run), undisturbed)


def test_after_ctrl_c(undisturbed):
    run = trainer()
    run.callbacks = [Once(6, lambda: os.kill(os.getpid(), signal.SIGINT))]
    with pytest.raises(StoppedError, match=r"SIGINT: stopped in epoch 2 after step 6; .*call fit again to go on"):
        run.fit(shuffled(), batches())
    run.fit(shuffled(), batches())
    assert same(weights(run), undisturbed)


def test_after_an_error_in_a_callback(undisturbed):
    def fail():
        raise KeyError("mine")

    for at in (4, 6):
        run = trainer()
        run.callbacks = [Once(at, fail)]
        with pytest.raises(KeyError, match="mine"):
            run.fit(shuffled(), batches())
        run.fit(shuffled(), batches())
        assert run.position.global_step == EPOCHS * BATCHES
        assert same(weights(run), undisturbed)


def test_after_bad_images_with_the_mended_ones():
    class Spoiled:
        def __init__(self, at):
            self.at = at

        def __len__(self):
            return BATCHES

        def __iter__(self):
            for number, (x, y) in enumerate(batches()):
                yield (x * 300 if number == self.at else x), y

    run = trainer()
    with pytest.raises(InputError, match="train"):
        run.fit(Spoiled(2), batches())
    assert run.position.global_step == 2
    run.fit(Spoiled(None), batches())
    assert run.position.global_step == EPOCHS * BATCHES


def test_a_signal_in_validation_ends_it_and_the_epoch_is_closed_when_training_goes_on(tmp_path, undisturbed):
    class Interrupting:
        signalled = False

        def __iter__(self):
            for number, batch in enumerate(batches()):
                if number == 2 and run.position.global_step == 8 and not self.signalled:
                    self.signalled = True
                    os.kill(os.getpid(), signal.SIGINT)
                yield batch

    validation, run = Interrupting(), trainer(tmp_path)
    with pytest.raises(StoppedError, match="stopped in epoch 2 after step 8"):
        run.fit(shuffled(), validation)
    assert len(run.history) == 1
    assert load_checkpoint(tmp_path / "last.pt")[1]["position"] == {"epoch": 2, "batch": 4, "global_step": 8}
    resumed = trainer(tmp_path, resume="auto")
    run.fit(shuffled(), validation)
    assert [report.global_step for report in run.history] == [4, 8, 12]
    assert same(weights(run), undisturbed)
    del resumed


def test_the_same_from_its_checkpoint(tmp_path, undisturbed):
    def interrupting():
        for number, batch in enumerate(batches()):
            if number == 2 and run.position.global_step == 8:
                run.stop()
            yield batch

    class Validation:
        __iter__ = staticmethod(interrupting)

    run = trainer(tmp_path)
    run.fit(shuffled(), Validation())
    torch.manual_seed(99)
    resumed = trainer(tmp_path, resume="auto")
    history = resumed.fit(shuffled(), batches())
    assert [report.global_step for report in history] == [4, 8, 12]
    assert all(report.images_per_second > 0 for report in history)
    assert same(weights(resumed), undisturbed)


def test_another_number_of_batches_is_refused_in_mid_epoch_only():
    run = trainer()
    run.callbacks = [Once(6, run.stop)]
    run.fit(batches(), batches())
    with pytest.raises(InputError, match="train has 3 batches, but the epoch in progress has 4, of which 2 are done"):
        run.fit(batches(3), batches())
    run.fit(batches(), batches())
    run.epochs = 4
    run.fit(batches(3), batches())
    assert run.position.global_step == 15


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ema", 0.9),
        ("method", Natural()),
        ("schedule", "cosine"),
        ("folder", "elsewhere"),
        ("attack", PGD.partial(eps=0.2)),
        ("validation_attack", PGD.partial(eps=0.2)),
    ],
)
def test_a_setting_that_nobody_would_follow_is_refused(name, value):
    run = trainer(epochs=1)
    run.fit(batches(), batches())
    setattr(run, name, value)
    with pytest.raises(InputError, match=f"changed since the trainer was made: {name}"):
        run.fit(batches(), batches())


def test_fit_within_a_callback_is_refused():
    run = trainer(epochs=1)
    run.callbacks = [Once(2, lambda: run.fit(batches(), batches()))]
    with pytest.raises(InputError, match="fit was called while it runs"):
        run.fit(batches(), batches())
    run.fit(batches(), batches())
    assert run.position.global_step == 4


def test_an_epoch_in_progress_is_resumed_with_as_many_batches(tmp_path):
    run = trainer(tmp_path)
    run.callbacks = [Once(6, run.stop)]
    run.fit(batches(), batches())
    for count in (1, 3, 8):
        with pytest.raises(CheckpointError, match=f"epoch of 4 batches, of which 2 are done; train has {count}"):
            trainer(tmp_path, resume="auto").fit(batches(count), batches())


def test_the_schedule_ends_with_the_run_whatever_the_length_of_epochs(tmp_path):
    asked = []

    def schedule(progress):
        asked.append(progress)
        return 1 - progress

    trainer(tmp_path, epochs=2, schedule=schedule).fit(batches(8), batches())
    asked.clear()
    run = trainer(tmp_path, epochs=4, schedule=schedule, resume="auto")
    run.fit(batches(2), batches())
    assert asked[0] == 0.5
    assert sorted(asked) == asked
    assert max(asked) == 0.875


def test_for_more_epochs(tmp_path):
    whole = trainer(tmp_path / "whole", epochs=5, schedule=constant)
    whole.fit(shuffled(), batches())
    run = trainer(tmp_path / "grown", epochs=2, schedule=constant)
    run.fit(shuffled(), batches())
    run.fit(shuffled(), batches())  # nothing left: nothing done
    assert len(run.history) == 2
    torch.rand(7)
    run.epochs = 5
    assert len(run.fit(shuffled(), batches())) == 5
    assert same(weights(run), weights(whole))


def test_epochs_may_grow_on_resume_and_it_is_said(tmp_path, capsys):
    trainer(tmp_path, epochs=2).fit(batches(), batches())
    run = trainer(tmp_path, epochs=np.int64(4), resume="auto")
    run.fit(batches(), batches())
    assert [report.epoch for report in run.history] == [1, 2, 3, 4]
    assert "is of a run of 2 epochs; learning rates follow the schedule of 4 from here on" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"last\.pt is of another run: epochs is 4 there and 3 here"):
        trainer(tmp_path, epochs=3, resume="auto").fit(batches(), batches())


def test_after_an_attack_that_cannot_be_made_a_resumed_run_is_still_exact(tmp_path, undisturbed):
    cannot = []

    def attack(model):
        return cannot.pop() if cannot else PGD(model, **PGD_1)

    method = AFD(attack=GivenAttack(attack), validation_attack=None)
    first = trainer(tmp_path, method=method)
    first.callbacks = [Once(6, first.stop)]
    first.fit(shuffled(), batches())
    torch.manual_seed(99)
    run = trainer(tmp_path, method=method, resume="auto")
    cannot.append("no attack")
    with pytest.raises(AfdError, match="attack made a str of the model"):
        run.fit(shuffled(), batches())
    run.fit(shuffled(), batches())
    assert same(weights(run), undisturbed)


# --- the folder -----------------------------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_not_taken_without_a_word(tmp_path):
    trainer(tmp_path).fit(batches(), batches())
    before = (tmp_path / "best.pt").read_bytes()
    with pytest.raises(FolderError, match="holds the checkpoints of a run; go on with it by resume='auto'"):
        trainer(tmp_path).fit(batches(), batches())
    assert (tmp_path / "best.pt").read_bytes() == before
    with pytest.raises(InputError, match="gone on with or discarded, not both"):
        trainer(tmp_path, overwrite=True, resume="auto")
    with pytest.raises(InputError, match="which overwrite would discard"):
        trainer(tmp_path, overwrite=True, resume=tmp_path / "best.pt")
    trainer(tmp_path, overwrite=True, epochs=1).fit(batches(), batches())
    assert load_checkpoint(tmp_path / "best.pt")[1]["report"]["epoch"] == 1
    assert not (tmp_path / "previous.pt").exists()


def test_an_older_checkpoint_is_gone_on_with_in_another_folder(tmp_path):
    trainer(tmp_path / "a").fit(batches(), batches())
    with pytest.raises(FolderError, match="holds the checkpoints of a run"):
        trainer(tmp_path / "a", resume=tmp_path / "a" / "previous.pt").fit(batches(), batches())
    run = trainer(tmp_path / "b", resume=str(tmp_path / "a" / "previous.pt"))
    run.fit(batches(), batches())
    assert len(run.history) == EPOCHS
    assert load_checkpoint(tmp_path / "b" / "best.pt")[1]["report"]["epoch"] == run.best.epoch


def test_two_trainers_do_not_share_a_folder(tmp_path):
    def intrude():
        import threading

        def other():
            try:
                trainer(tmp_path).fit(batches(), batches())
            except FolderError as error:
                said.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    said = []
    run = trainer(tmp_path, epochs=1)
    run.callbacks = [Once(2, intrude)]
    run.fit(batches(), batches())
    assert said == [f"{tmp_path} is in use by another run of this process; name another folder"]
    assert not (tmp_path / ".lock").exists()


def test_a_folder_that_another_run_has_taken_meanwhile_is_not_taken_back(tmp_path):
    run = trainer(tmp_path, epochs=1)
    run.fit(batches(), batches())
    trainer(tmp_path, overwrite=True, epochs=1).fit(batches(), batches())
    run.epochs = 2
    with pytest.raises(FolderError, match=r"another run has written to .* since this one did"):
        run.fit(batches(), batches())


def test_a_folder_that_is_removed_in_mid_run_is_not_another_runs(tmp_path):
    import shutil

    folder = tmp_path / "run"
    run = trainer(folder)
    run.callbacks = [Once(6, lambda: shutil.rmtree(folder))]
    with pytest.raises(FolderError, match="was removed or replaced while it was in use"):
        run.fit(batches(), batches())
    assert not folder.exists()


def test_nothing_to_go_on_from_is_said(tmp_path, capsys):
    trainer(tmp_path, epochs=1, resume="auto").fit(batches(), batches())
    assert f"there is nothing to go on from in {tmp_path}; the run begins anew" in capsys.readouterr().err


# --- what is kept can be read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"config": {"lr": {1, 2}}}, "config.lr is a set, which a checkpoint cannot hold"),
        ({"config": {"net": {"act": torch.relu}}}, "config.net.act is a builtin_function_or_method, which"),
        (
            {"method": Natural(optimizers={"task": lambda p: torch.optim.SGD([{"params": p, "tag": object()}], 0.1)})},
            r"optimizers.task.param_groups.0.tag is a object, which a checkpoint cannot hold",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name_before_training(settings, said, tmp_path):
    run = trainer(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=said):
        run.fit(batches(), batches())
    assert run.position.global_step == 0
    assert list(tmp_path.iterdir()) == []


FEW = {"attack": PGD_1, "validation_attack": None}
NUMPYS = PGDSettings(eps=np.float64(0.1), alpha=np.float32(0.05), steps=np.int64(1), bounds=(np.float32(0), 1))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": AFD(lr=np.float64(0.01), momentum=np.float32(0.9), weight_decay=np.float64(1e-4), **FEW)},
        {"epochs": np.int64(3), "seed": np.int32(4), "config": {"lr": np.float64(0.1), "steps": [np.int64(3)]}},
        {"method": AFD(**FEW | {"attack": NUMPYS}), "ema": np.float64(0.9)},
    ],
)
def test_numpys_numbers_are_kept_as_numbers(settings, tmp_path):
    first = trainer(tmp_path, **settings)
    first.callbacks = [Once(6, first.stop)]
    first.fit(batches(), batches())
    second = trainer(tmp_path, **settings, resume="auto")
    assert len(second.fit(batches(), batches())) == 3


def test_another_number_of_numpys_is_another_run(tmp_path):
    trainer(tmp_path, config={"steps": np.int64(3)}).fit(batches(), batches())
    with pytest.raises(CheckpointError, match="steps is 3 there and 4 here"):
        trainer(tmp_path, config={"steps": np.int64(4)}, resume="auto").fit(batches(), batches())


class Extra(nn.Linear):
    """Says something of its own beside its weights."""

    said = None

    def get_extra_state(self):
        return self.said

    def set_extra_state(self, state):
        self.said = state


def test_tensors_with_attributes_and_dicts_that_hold_themselves_are_refused_by_name(tmp_path):
    tagged, round_about = torch.zeros(2), {}
    tagged.tag, round_about["self"] = np.float64(3), round_about
    for extra, said in ((tagged, r"model\.1\._extra_state is a torch\.Tensor"), (round_about, "holds itself")):
        model = nn.Sequential(nn.Linear(16, 8), Extra(8, 4))
        model[1].said = extra
        with pytest.raises(CheckpointError, match=said):
            Trainer(model, Natural(), folder=tmp_path).fit(batches(), batches())
    model[1].said = torch.zeros(2)
    Trainer(model, Natural(), folder=tmp_path).fit(batches(), batches())


def test_a_config_with_nan_goes_on(tmp_path):
    run = trainer(tmp_path, config={"x": float("nan")})
    run.callbacks = [Once(6, run.stop)]
    run.fit(batches(), batches())
    assert len(trainer(tmp_path, config={"x": float("nan")}, resume="auto").fit(batches(), batches())) == 3


def test_another_rate_of_ones_own_optimizer_is_another_run(tmp_path):
    def made(lr):
        return Natural(optimizers={"task": lambda p: torch.optim.SGD(p, lr=lr, momentum=0.5)})

    trainer(tmp_path, method=made(0.1)).fit(batches(), batches())
    with pytest.raises(CheckpointError, match=r"optimizers\.task\..*initial_lr is 0\.1 there and 1e-05 here"):
        trainer(tmp_path, method=made(1e-5), resume="auto").fit(batches(), batches())


# --- the best epoch -------------------------------------------------------------------------------------------------


def scores(monkeypatch, *of):
    """Validation is a list of scores."""
    left = list(of)
    monkeypatch.setattr("afd.training.validation.shared_accuracy", lambda *_, **__: left.pop(0))


SCORES = [0.5, 0.7, 0.6, 0.8]


def epochs_kept(run, folder, again):
    """How many epochs are not validated once more when it goes on."""
    if again == "fit":
        return len(run.history)
    return len(load_checkpoint(folder / "last.pt")[1]["history"]) if (folder / "last.pt").exists() else 0


def best_epoch(folder):
    return load_checkpoint(folder / "best.pt")[1]["report"]["epoch"]


def test_of_equals_the_later_epoch_is_the_best(tmp_path, monkeypatch):
    scores(monkeypatch, 0.5, 0.7, 0.7, 0.6)
    run = trainer(tmp_path, epochs=4)
    run.fit(batches(), batches())
    assert (run.best.epoch, best_epoch(tmp_path)) == (3, 3)


@pytest.mark.parametrize("fails_at", range(8))
def test_whatever_write_fails_best_pt_holds_the_epoch_that_the_run_names(fails_at, tmp_path, monkeypatch):
    """A run whose n-th checkpoint cannot be written, gone on with in the same process and in another one."""
    from afd import checkpoint

    real, calls = checkpoint.save_checkpoint, iter(range(100))

    def failing(path, *rest):
        if next(calls) == fails_at:
            raise CheckpointError("cannot write: No space left on device")
        real(path, *rest)

    for again in ("fit", "resume"):
        folder = tmp_path / again
        monkeypatch.setattr(checkpoint, "save_checkpoint", failing)
        calls = iter(range(100))
        scores(monkeypatch, *SCORES)
        run = trainer(folder, epochs=4)
        try:
            run.fit(shuffled(), batches())
            failed = False
        except CheckpointError:
            failed = True
        assert failed == (fails_at < 7)
        monkeypatch.setattr(checkpoint, "save_checkpoint", real)
        if failed:
            run = run if again == "fit" else trainer(folder, epochs=4, resume="auto")
            scores(monkeypatch, *SCORES[epochs_kept(run, folder, again) :])
            run.fit(shuffled(), batches())
        assert [report.score for report in run.history] == SCORES
        assert run.best.epoch == best_epoch(folder) == 4
        kept = load_checkpoint(folder / "best.pt")[0]["model"]
        assert all(torch.equal(kept[name], load_checkpoint(folder / "last.pt")[0]["model"][name]) for name in kept)


def test_a_best_checkpoint_that_is_gone_is_named_and_another_takes_its_place(tmp_path, monkeypatch, capsys):
    scores(monkeypatch, 0.9, 0.5, 0.6)
    trainer(tmp_path).fit(batches(), batches())
    assert best_epoch(tmp_path) == 1
    (tmp_path / "best.pt").unlink()
    run = trainer(tmp_path, resume="auto")
    run.fit(batches(), batches())
    assert "the weights of epoch 1, the best until now, are in none of the checkpoints" in capsys.readouterr().err
    assert run.best.epoch == best_epoch(tmp_path) == 3


def test_best_without_last_is_no_run_to_go_on_with(tmp_path):
    trainer(tmp_path).fit(batches(), batches())
    (tmp_path / "last.pt").unlink()
    (tmp_path / "previous.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint to go on from .* holds best\.pt only"):
        trainer(tmp_path, resume="auto").fit(batches(), batches())
    assert isinstance(EpochReport(**load_checkpoint(tmp_path / "best.pt")[1]["report"]), EpochReport)
