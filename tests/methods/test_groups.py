"""What decays, and how fast each layer of a network learns."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from afd.attacks import PGDSettings
from afd.errors import InputError
from afd.methods import AFD, AT, JARN
from afd.methods.groups import groups_of, layers_of, undecayed
from afd.methods.optimizers import make_recordable
from afd.nn import build_model
from afd.training import Trainer
from afd.training.schedules import Rates, cosine

ATTACK = PGDSettings(eps=0.1, steps=1)


class Block(nn.Module):
    """As of a transformer, so far as it has parameters."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Transformer(nn.Module):
    """A stem, a token, positions, three blocks, a norm and a head, registered in that order."""

    def __init__(self, width=8):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, width))
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.blocks = nn.ModuleList([Block(width) for _ in range(3)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Naming(Transformer):
    """One that says itself what does not decay, as timm's do."""

    def no_weight_decay(self):
        return {"pos_embed"}


def by_name(model, found):
    """What `found` has by id, by name."""
    return {name: found[id(one)] for name, one in model.named_parameters()}


def test_layers_are_stem_blocks_and_head():
    layers = by_name(model := Transformer(), layers_of(model))
    assert {name.split(".")[0] for name, layer in layers.items() if layer == 0} == {"cls_token", "pos_embed", "patches"}
    for block in range(3):
        assert {layer for name, layer in layers.items() if name.startswith(f"blocks.{block}.")} == {block + 1}
    assert {name for name, layer in layers.items() if layer == 4} == {
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    }


def test_layers_of_a_residual_network_are_its_blocks():
    model = build_model("resnet18", (3, 32, 32), 10, width=4)
    layers = by_name(model, layers_of(model))
    assert {layers[name] for name in layers if name.startswith(("encoder.stem", "encoder.bn"))} == {0}
    assert [layers[f"encoder.stages.{block}.conv1.weight"] for block in range(8)] == list(range(1, 9))
    assert layers["encoder.stages.2.shortcut.0.weight"] == 3
    assert layers["classifier.weight"] == layers["classifier.bias"] == 9


@pytest.mark.parametrize(
    ("name", "blocks"), [("preactresnet18", 8), ("wideresnet28-10", 12), ("vgg11-bn", 8), ("convnet", 4)]
)
def test_every_network_of_afd_has_layers(name, blocks):
    model = build_model(name, (3, 32, 32), 10, width=4)
    layers = by_name(model, layers_of(model))
    assert sorted(set(layers.values()) | {0}) == list(range(blocks + 2))
    assert layers["classifier.weight"] == blocks + 1


def test_stages_of_blocks_are_opened_and_what_lies_between_blocks_goes_with_the_next():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.downsample = nn.Conv2d(8, 8, 2)
            self.layers = nn.Sequential(Block(8), Block(8))

    model = nn.Sequential(nn.Conv2d(3, 8, 2), nn.ModuleList([Stage(), Stage()]), nn.Linear(8, 2))
    layers = by_name(model, layers_of(model))
    assert [layers[f"1.{stage}.layers.{one}.norm.weight"] for stage in (0, 1) for one in (0, 1)] == [1, 2, 3, 4]
    assert layers["0.weight"] == layers["1.0.downsample.weight"] == 0
    assert layers["1.1.downsample.weight"] == 3
    assert layers["2.weight"] == 5


def test_a_block_whose_layers_are_modules_of_their_own_stays_one_block():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    class Bottleneck(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(Layer(), Layer(), Layer())

    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(Bottleneck(), Bottleneck())

    layers = layers_of(model := nn.Sequential(Stage(), Stage()))
    assert sorted(set(by_name(model, layers).values())) == [1, 2, 3, 4]


def test_a_chain_of_plain_layers_has_one_each_with_its_norm():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    assert list(by_name(model, layers_of(model)).values()) == [1] * 4 + [2] * 4 + [3] * 2


def test_without_a_chain_there_are_no_layers():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.only = nn.Linear(4, 2)

    with pytest.raises(InputError, match="layer_decay is given, but Plain has no blocks"):
        layers_of(Plain())


def test_rates_fall_from_the_head_to_the_stem():
    model = Transformer()
    groups = groups_of(model, lr=0.1, layer_decay=0.5)
    rates = {id(one): group["lr"] for group in groups for one in group["params"]}
    assert by_name(model, rates) == {
        name: 0.1 * 0.5 ** (4 - layer) for name, layer in by_name(model, layers_of(model)).items()
    }
    assert groups[0]["lr"] == 0.1


def test_positions_and_tokens_do_not_decay():
    model = Transformer()
    first, second = groups_of(model, lr=0.1, decay_norms=False)
    names = {id(one): name for name, one in model.named_parameters()}
    assert {names[id(one)] for one in second["params"]} == {
        name for name, one in model.named_parameters() if one.dim() == 1 or name in ("cls_token", "pos_embed")
    }
    assert second["weight_decay"] == 0.0
    assert "weight_decay" not in first


def test_a_network_that_names_what_does_not_decay_is_believed_inside_of_another_too():
    inner = Naming()
    assert undecayed(inner) == undecayed(nn.Sequential(inner)) == {id(inner.pos_embed)}


@pytest.mark.parametrize(
    "name", ["position_embeddings", "pos_embedding", "class_token", "relative_position_bias_table"]
)
def test_names_of_other_libraries(name):
    module = nn.Linear(2, 2)
    module.register_parameter(name, nn.Parameter(torch.zeros(2, 2)))
    assert undecayed(nn.Sequential(module)) == {id(getattr(module, name))}


def test_residual_networks_decay_as_they_did():
    model = build_model("resnet18", (3, 32, 32), 10, width=4)
    assert undecayed(model) == set()
    weights, others = groups_of(model, lr=0.1, decay_norms=False)
    assert {one.dim() for one in others["params"]} == {1}
    assert {one.dim() for one in weights["params"]} == {2, 4}


def test_each_group_follows_the_schedule_from_its_own_rate():
    settings = AT(lr=0.1, layer_decay=0.5, attack=ATTACK)
    optimizer = settings.build(Transformer()).optimizers["task"]
    first = [group["lr"] for group in optimizer.param_groups]
    assert first == [0.1, 0.05, 0.025, 0.0125, 0.00625]
    rates = Rates({"task": optimizer}, cosine, steps=4)
    total = 0.0
    for done in range(4):
        rates.set(done)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [cosine(done / 4) * one for one in first]
        )
        total += sum(group["lr"] for group in optimizer.param_groups)
    assert total == pytest.approx(sum(first) * sum(cosine(done / 4) for done in range(4)))
    assert rates.of_step(1) == {"task": 0.1}


def test_rates_that_a_recorded_step_reads_are_each_groups_own():
    optimizer = AT(lr=0.1, optimizer="adamw", layer_decay=0.5, attack=ATTACK).build(Transformer()).optimizers["task"]
    make_recordable(optimizer, torch.device("cpu"))
    held = [group["lr"] for group in optimizer.param_groups]
    Rates({"task": optimizer}, cosine, steps=4).set(2)
    assert [group["lr"] for group in optimizer.param_groups] == held  # filled, and where they were
    assert [float(one) for one in held] == pytest.approx([0.05 * 0.5**layer for layer in range(5)])


def test_only_the_model_has_layers_that_learn_apart():
    model = build_model("convnet", (1, 8, 8), 10, width=4)
    step = AFD.adam(layer_decay=0.5, attack=ATTACK).build(model)
    rates = {name: len({group["lr"] for group in one.param_groups}) for name, one in step.optimizers.items()}
    assert rates == {"task": 5, "discriminator": 1, "features": 5}
    step = JARN(layer_decay=0.5, discriminator_layers=2).build(build_model("convnet", (1, 8, 8), 10, width=4))
    rates = {name: len({group["lr"] for group in one.param_groups}) for name, one in step.optimizers.items()}
    assert rates == {"task": 5, "adapter": 1, "discriminator": 1}


def test_one_rate_is_one_group_as_before():
    for layer_decay in (None, 1.0):
        optimizer = AT(layer_decay=layer_decay, attack=ATTACK).build(Transformer()).optimizers["task"]
        assert {group["lr"] for group in optimizer.param_groups} == {0.1}
    (group,) = AT(attack=ATTACK).build(Transformer()).optimizers["task"].param_groups
    assert len(group["params"]) == len(list(Transformer().parameters()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_decay": 0.0}, "layer_decay is 0.0; it must be"),
        ({"layer_decay": 1.5}, r"layer_decay is 1.5; it must be in \(0, 1\]"),
        ({"layer_decay": 0.5, "optimizers": {"task": torch.optim.Adagrad}}, "an optimizer of your own sets its rates"),
    ],
)
def test_what_cannot_be(settings, message):
    with pytest.raises(InputError, match=message):
        AT(**settings)


def batches():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(24, 1, 8, 8, generator=generator)
    return [(x[at : at + 8], torch.arange(8) % 10) for at in (0, 8, 16)]


def test_a_run_goes_on_with_the_rates_of_its_layers(tmp_path):
    method = AT(lr=0.01, optimizer="adamw", weight_decay=0.05, decay_norms=False, layer_decay=0.75, attack=ATTACK)

    def trainer(epochs, **settings):
        torch.manual_seed(0)
        return Trainer(Transformer(), method, epochs=epochs, on_alarm="off", **settings)

    whole = trainer(2, schedule=lambda _: 1.0)
    whole.fit(batches(), batches()[:1])
    trainer(1, schedule=lambda _: 1.0, folder=tmp_path).fit(batches(), batches()[:1])
    rest = trainer(2, schedule=lambda _: 1.0, folder=tmp_path, resume="auto")
    rest.fit(batches(), batches()[:1])
    for one, other in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(one, other)
    other = Trainer(Transformer(), replace(method, layer_decay=0.5), epochs=3, folder=tmp_path, resume="auto")
    with pytest.raises(Exception, match=r"method.layer_decay is 0.75 there and 0.5 here"):
        other.fit(batches(), batches()[:1])
