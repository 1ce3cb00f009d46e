"""Files of weights as training scripts write them, and what is said of those that do not fit."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from afd.nn import Normalized, build_model
from afd.training import CheckpointError, load_weights
from afd.training.rebuilt import rebuild
from afd.training.weight_files import OtherHeadError, by_own_names, fit_into, read_weights


class Net(nn.Module):
    """A network of which one part is called model."""

    def __init__(self, classes=4):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.model, self.fc = nn.Linear(4, 6), nn.Linear(6, classes)

    def forward(self, x):
        return self.fc(self.model(self.norm(self.stem(x)).mean((2, 3))).relu())


def state(classes=4):
    torch.manual_seed(7)
    return Net(classes).state_dict()


def prefixed(prefix):
    return {f"{prefix}{name}": one for name, one in state().items()}


STATS = {"new_mean": torch.tensor([0.4, 0.5, 0.6])[:, None, None], "new_std": torch.full((3, 1, 1), 0.25)}
MADRY = {
    **prefixed("module.model."),
    **prefixed("module.attacker.model."),
    **{f"module.normalizer.{name}": one for name, one in STATS.items()},
    **{f"module.attacker.normalize.{name}": one for name, one in STATS.items()},
}
LAYOUTS = {
    "plain": state(),
    "DataParallel": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "both": prefixed("module._orig_mod."),
    "RobustBench": prefixed("model."),
    "state_dict": {"state_dict": prefixed("module."), "epoch": 3, "arch": "net"},
    "model": {"model": state(), "optimizer": {"lr": 0.1}},
    "model_state_dict": {"model_state_dict": prefixed("module.")},
    "model_ema": {"model_ema": state()},
    "timm": {"state_dict_ema": state(), "epoch": 1},
}


def check_is(model):
    for name, one in model.state_dict().items():
        assert torch.equal(one, state()[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_load_by_the_networks_own_names(layout, tmp_path):
    torch.save(LAYOUTS[layout], tmp_path / "w.pt")
    for load in (
        lambda path, model: load_weights(path, model).model,
        lambda path, model: rebuild(path, model=model).network,
    ):
        check_is(load(tmp_path / "w.pt", Net()))


def test_robustness_checkpoints_load_into_a_network_that_normalises_as_theirs_did(tmp_path):
    torch.save({"model": MADRY, "epoch": 90}, tmp_path / "w.pt")
    check_is(load_weights(tmp_path / "w.pt", Normalized(Net(), (0.4, 0.5, 0.6), (0.25,) * 3)).model)
    told = "go on with --input-stats 0.4,0.5,0.6,0.25,0.25,0.25"
    with pytest.raises(CheckpointError, match=f"normalises images, and this one takes them as they are.*{told}"):
        load_weights(tmp_path / "w.pt", Net())
    with pytest.raises(CheckpointError, match=f"takes them by 0.5,0.25; {told}"):
        load_weights(tmp_path / "w.pt", Normalized(Net(), 0.5, 0.25))


def test_a_file_of_pickled_objects_is_refused_with_what_to_do(tmp_path):
    torch.save({"model": state(), "schedule": Net}, tmp_path / "w.pt")
    for load in (read_weights, rebuild):
        with pytest.raises(
            CheckpointError, match=r"holds pickled Python objects beside its tensors .*pickle_module=dill"
        ):
            load(tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"model": Net}))
    with pytest.raises(CheckpointError):
        read_weights(tmp_path / "w.pt")


def test_weights_that_fit_partly_are_listed(tmp_path):
    part = {name: one for name, one in state().items() if not name.startswith(("stem", "norm.running"))}
    torch.save({**part, "extra.one": torch.zeros(1), "model.bias": torch.zeros(5)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError) as refused:
        load_weights(tmp_path / "w.pt", Net())
    told = str(refused.value)
    assert "does not load into a Net: of 11 tensors, 4 missing (stem.weight, stem.bias, norm.running_mean, …)" in told
    assert "1 not of the model (extra.one); 1 of another shape (model.bias: [5] there, [6] here)" in told


def test_another_number_of_classes_is_told_apart_and_a_fresh_head_stays():
    model = Net()
    kept = model.fc.weight.clone()
    with pytest.raises(OtherHeadError, match="its last layer, fc, has 9 classes there and 4 here"):
        fit_into(model, state(9), "w.pt", "fc")
    fit_into(model, state(9), "w.pt", "fc", fresh_head=True)
    assert torch.equal(model.fc.weight, kept)
    assert torch.equal(model.stem.weight, state()["stem.weight"])
    with pytest.raises(CheckpointError, match="1 missing"):
        fit_into(
            model, {name: one for name, one in state().items() if name != "stem.bias"}, "w.pt", "fc", fresh_head=True
        )


def test_files_of_before_batches_were_counted_load():
    model = Net()
    fit_into(model, {name: one for name, one in state().items() if "num_batches" not in name}, "w.pt", "fc")
    check_is(model)
    old = {name: one for name, one in state().items() if "num_batches" not in name and name != "stem.bias"}
    with pytest.raises(CheckpointError, match=r"of 11 tensors, 1 missing \(stem.bias\)$"):
        fit_into(model, old, "w.pt", "fc")


def test_names_of_a_network_that_begin_as_wrappers_do_are_its_own():
    assert by_own_names(state(), Net(), "w.pt").keys() == state().keys()


def test_torchvisions_resnet50_loads_into_afds_by_its_own_names(tmp_path):
    torch.manual_seed(0)
    theirs = build_model("resnet50", (3, 32, 32), 10, 2).eval()
    theirs.normalize = False
    named = {
        name.removeprefix("encoder.").replace("classifier", "fc"): one for name, one in theirs.state_dict().items()
    }
    torch.save({f"module.{name}": one for name, one in named.items()}, tmp_path / "w.pt")
    found = rebuild(tmp_path / "w.pt", model=build_model("resnet50", (3, 32, 32), 10, 2))
    x = torch.rand(2, 3, 32, 32)
    assert found.published
    assert torch.equal(found.network(x), theirs(x))
    normalised = build_model("resnet50", (3, 32, 32), 10, 2, input_stats=((0.5,) * 3, (0.25,) * 3))
    stats = {"normalize.mean": torch.full((3,), 0.5), "normalize.std": torch.full((3,), 0.25)}
    torch.save({**{f"model.{name}": one for name, one in named.items()}, **stats}, tmp_path / "w.pt")
    torch.testing.assert_close(load_weights(tmp_path / "w.pt", normalised).eval()(x), theirs((x - 0.5) / 0.25))


@pytest.mark.parametrize(
    "content",
    [
        {"net": state(), "acc": 94.1},
        {"state_dict": {"model": state()}},
        {"state_dict": {"epoch": 3}, "model": state()},
        {"model": {"name": "net"}, "net": state()},
    ],
)
def test_the_weights_are_found_wherever_scripts_keep_them(content, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    assert read_weights(tmp_path / "w.pt")[0].keys() == state().keys()


def test_names_that_are_no_words_are_no_state_dict(tmp_path):
    torch.save({**state(), 0: torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="holds no state_dict of a model"):
        read_weights(tmp_path / "w.pt")


def test_weights_that_are_not_finite_are_named():
    spoilt = state()
    spoilt["fc.bias"][1] = float("nan")
    with pytest.raises(CheckpointError, match=r"w.pt holds 1 tensors with NaN or infinite values \(fc.bias\)"):
        fit_into(Net(), spoilt, "w.pt", "fc")


class Evil:
    """What would run code where it is loaded."""

    def __reduce__(self):
        return exit, (3,)


def test_what_would_run_code_is_neither_run_nor_advised(tmp_path):
    torch.save({"model": state(), "args": Evil()}, tmp_path / "w.pt")
    for load in (read_weights, rebuild):
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path / "w.pt")
        assert "weights_only" not in str(caught.value) or "holds pickled Python objects" in str(caught.value)
