"""The released code's checkpoint layout, written by stand-ins for its networks, comes out as the same functions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import spectral_norm

from afd.nn import FeatureClassifier, ProjectionDiscriminator, ResNet18
from afd.training import CheckpointError
from afd.training.released import into_discriminator, into_model, load_released

pytestmark = pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")


class Encoder(nn.Module):
    """The layout of the released CIFAR network, made of the blocks of ours: only names differ."""

    def __init__(self, width=4):
        super().__init__()
        ours = ResNet18(3, width)
        self.conv1, self.bn1 = ours.stem, ours.bn
        for number in range(4):
            self.add_module(f"layer{number + 1}", nn.Sequential(*ours.stages[2 * number : 2 * number + 2]))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        for number in range(1, 5):
            out = getattr(self, f"layer{number}")(out)
        return F.normalize(F.adaptive_avg_pool2d(out, 1).flatten(1))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 5)


class Critic(nn.Module):
    """Encoder and discriminator with old-style spectral norms, as the paper's last section describes."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.linear1, self.linear2 = (spectral_norm(nn.Linear(32, 32)) for _ in range(2))
        self.l7, self.l_y = spectral_norm(nn.Linear(32, 1)), spectral_norm(nn.Embedding(5, 32))

    def forward(self, z, y):
        h = F.leaky_relu(self.linear2(F.leaky_relu(self.linear1(z), 0.2)), 0.2)
        return self.l7(h).squeeze(1) + (self.l_y(y) * h).sum(1)


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    encoder, decoder = Encoder(), Decoder()
    critic = Critic(encoder)
    for _ in range(3):  # BatchNorm statistics and power iterations move
        encoder(torch.rand(6, 3, 8, 8))
        critic(torch.rand(6, 32), torch.arange(6) % 5)
    return encoder.eval(), decoder.eval(), critic.eval()


def write(path, networks, wrap=lambda state: state):
    encoder, decoder, critic = networks
    content = {
        "E_state_dict": wrap(encoder.state_dict()), "Dc_state_dict": wrap(decoder.state_dict()),
        "EDa_state_dict": wrap(critic.state_dict()), "optEDc": {}, "optE": {}, "optDa": {},
        "epoch": 300, "iteration": 117000, "enc_model": "resnet18norm",
    }  # fmt: skip
    torch.save(content, path)
    return path


def parallel(state):
    return {f"module.{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize("wrap", [dict, parallel])
def test_the_three_networks_compute_what_they_did(wrap, networks, tmp_path):
    encoder, decoder, critic = networks
    released = load_released(write(tmp_path / "cifar10_model_last.pt", networks, wrap))
    assert (released.epoch, released.network) == (300, "resnet18norm")
    model = into_model(released, FeatureClassifier(ResNet18(3, 4), 32, 5, normalize=False)).eval()
    discriminator = into_discriminator(released, ProjectionDiscriminator(32, 5, 32)).eval()
    x, y = torch.rand(7, 3, 8, 8), torch.arange(7) % 5
    z = encoder(x)
    torch.testing.assert_close(model.features(x), z)
    torch.testing.assert_close(model(x), decoder.linear(z))
    torch.testing.assert_close(discriminator(z, y), critic(z, y))


def test_the_released_encoder_itself_fits_too(networks, tmp_path):
    released = load_released(write(tmp_path / "last.pt", networks))
    model = into_model(released, FeatureClassifier(Encoder(), 32, 5)).eval()
    x = torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(model.features(x), networks[0](x))


def test_a_missing_right_singular_vector_is_made(networks, tmp_path):
    path = write(tmp_path / "old.pt", networks, lambda s: {k: v for k, v in s.items() if not k.endswith("weight_v")})
    discriminator = into_discriminator(load_released(path), ProjectionDiscriminator(32, 5, 32)).eval()
    z, y = torch.rand(7, 32), torch.arange(7) % 5
    torch.testing.assert_close(discriminator(z, y), networks[2](z, y), rtol=0.05, atol=0.05)


def test_what_does_not_fit_is_named(networks, tmp_path):
    released = load_released(write(tmp_path / "last.pt", networks))
    with pytest.raises(CheckpointError, match=r"the released F does not fit: .*size mismatch for stem.weight"):
        into_model(released, FeatureClassifier(ResNet18(3, 8), 64, 5))
    with pytest.raises(CheckpointError, match=r"the released D does not fit: .*size mismatch"):
        into_discriminator(released, ProjectionDiscriminator(32, 9, 32))
    torch.save({"E_state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"does not have the layout of a released AFD checkpoint: no 'Dc_state"):
        load_released(tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(CheckpointError, match=r"text.pt cannot be read"):
        load_released(tmp_path / "text.pt")
