"""VGG16's features and LPIPS' heads against a reference forward pass with the same weights."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from first_stage.config.schema import LossConfig, PretrainedConfig
from first_stage.errors import ConfigError
from first_stage.losses.learned import gram_matrix
from first_stage.losses.pretrained import LPIPS, VGG, Gram, PretrainedFeatures
from first_stage.losses.terms import Inputs, Surroundings
from first_stage.models.vgg import VGG16Features


class Distances:
    """The pretrained terms of a configuration as one function of reconstructions and images."""

    def __init__(self, config: PretrainedConfig, network: VGG16Features | None = None):
        surroundings = Surroundings()
        if network is not None:
            surroundings.network(PretrainedFeatures, lambda: PretrainedFeatures(config, network))
        loss = LossConfig(pretrained=config)
        kinds = [kind for kind in (VGG, LPIPS, Gram) if loss.weight_of(kind.name) > 0]
        self.terms = [kind(loss, surroundings) for kind in kinds]
        self.features = self.terms[0].features
        assert len(surroundings.networks) == 1  # however many terms there are

    def __call__(self, rebuilt: torch.Tensor, images: torch.Tensor) -> dict:
        inputs = Inputs(0, images, rebuilt)
        return {term.name: (term.weight, term.value(inputs)) for term in self.terms}


CONFIGURATION_D = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M"]
CONFIGURATION_D += [512, 512, 512, "M", 512, 512, 512, "M"]


def reference_network() -> nn.Sequential:
    """VGG16's convolutions as the paper's table 1 and torchvision lay them out."""
    parts, previous = [], 3
    for entry in CONFIGURATION_D:
        if entry == "M":
            parts.append(nn.MaxPool2d(2, 2))
        else:
            parts += [nn.Conv2d(previous, entry, 3, padding=1), nn.ReLU()]
            previous = entry
    return nn.Sequential(*parts)


def reference_maps(network: nn.Sequential, images: torch.Tensor) -> list[torch.Tensor]:
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    hidden, maps = ((images + 1) / 2 - mean) / std, []
    for number, part in enumerate(network):
        hidden = part(hidden)
        if number in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
            maps.append(hidden)
    return maps


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Random weights of VGG16 and of the heads in files, and the reference network."""
    folder = tmp_path_factory.mktemp("vgg")
    torch.manual_seed(0)
    network = reference_network()
    vgg = {f"features.{name}": tensor for name, tensor in network.state_dict().items()}
    vgg["classifier.0.weight"] = torch.zeros(2, 2)  # what else the original's file holds
    save_file(vgg, folder / "vgg.safetensors")
    torch.save(vgg, folder / "vgg.pth")
    widths = (64, 128, 256, 512, 512)
    heads = {f"lin{n}.model.1.weight": torch.rand(1, w, 1, 1) for n, w in enumerate(widths)}
    torch.save(heads, folder / "heads.pth")
    return folder, network, heads


def batches(size: int = 32):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 2, 3, size, size, generator=generator) * 2 - 1


@pytest.mark.parametrize("file", ["vgg.safetensors", "vgg.pth"])
def test_features_equal_a_reference_forward_pass(files, file):
    folder, network, _ = files
    config = PretrainedConfig(weights=str(folder / file), vgg_weight=2.0, layers=(0, 2))
    distances = Distances(config)
    x, y = batches()
    expected = reference_maps(network, x)
    found = distances.features.network(x)
    assert len(found) == 5
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    others = reference_maps(network, y)
    value = sum(((expected[n] - others[n]) ** 2).mean() for n in (0, 2)) / 2
    weight, distance = distances(x, y)["vgg"]
    assert weight == 2.0
    torch.testing.assert_close(distance, value)


def test_lpips_equals_a_reference(files):
    folder, network, heads = files
    distances = Distances(
        PretrainedConfig(
            weights=str(folder / "vgg.pth"), heads=str(folder / "heads.pth"), lpips_weight=1.0
        )
    )
    x, y = batches()
    expected = torch.zeros(2)
    maps = zip(reference_maps(network, x), reference_maps(network, y), strict=True)
    for (a, b), head in zip(maps, heads.values(), strict=True):
        a = a / (a.norm(dim=1, keepdim=True) + 1e-10)
        b = b / (b.norm(dim=1, keepdim=True) + 1e-10)
        expected += F.conv2d((a - b) ** 2, head).mean((2, 3)).squeeze(1)
    distances.features.train()  # a parent's train() must not switch anything on
    first, again = (distances(x, y)["lpips"][1] for _ in range(2))
    torch.testing.assert_close(first, expected.mean())
    assert first.item() == again.item()
    assert distances(x, x)["lpips"][1].item() == 0.0


def test_gram_equals_a_reference(files):
    folder, network, _ = files
    config = PretrainedConfig(weights=str(folder / "vgg.pth"), gram_weight=3.0, layers=(1,))
    x, y = batches()
    a, b = (gram_matrix(reference_maps(network, i)[1]) for i in (x, y))
    weight, value = Distances(config)(x, y)["gram"]
    assert weight == 3.0
    torch.testing.assert_close(value, ((a - b) ** 2).sum((1, 2)).mean())


def test_gradients_reach_the_reconstruction_and_nothing_else(files):
    folder, _, _ = files
    names = {"weights": str(folder / "vgg.pth"), "heads": str(folder / "heads.pth")}
    weights = {"vgg_weight": 1.0, "lpips_weight": 1.0, "gram_weight": 1.0}
    distances = Distances(PretrainedConfig(**names, **weights))
    x, y = (batch.requires_grad_() for batch in batches())
    for name, (_, value) in distances(x, y).items():
        x.grad = None
        value.backward(retain_graph=True)
        assert x.grad.abs().max() > 0, name
        assert y.grad is None, name
    assert all(p.grad is None for p in distances.features.parameters())


def test_the_ratio_to_a_pixel_error_does_not_depend_on_the_resolution(files):
    # Tiled images have the same statistics at 32 and 64, up to the borders.
    folder, _, _ = files
    names = {"weights": str(folder / "vgg.pth"), "heads": str(folder / "heads.pth")}
    distances = Distances(PretrainedConfig(**names, lpips_weight=1.0))
    x, y = batches()
    small, large = (
        distances(x.repeat(1, 1, n, n), y.repeat(1, 1, n, n))["lpips"][1] for n in (1, 2)
    )
    assert small.item() == pytest.approx(large.item(), rel=0.2)  # summed it would be 4 times


def test_other_channel_counts_take_a_stated_adapter(files):
    folder, _, _ = files
    gray = Distances(PretrainedConfig(weights=str(folder / "vgg.pth"), vgg_weight=1.0))
    x, y = (batch[:, :1] for batch in batches())
    expected = gray(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1))["vgg"][1]
    torch.testing.assert_close(gray(x, y)["vgg"][1], expected)
    chosen = Distances(PretrainedConfig(vgg_weight=1.0, channels=(3, 0, 1)), gray.features.network)
    x, y = (torch.cat([batch, batch[:, :1]], 1) for batch in batches())
    expected = gray(x[:, [3, 0, 1]], y[:, [3, 0, 1]])["vgg"][1]
    torch.testing.assert_close(chosen(x, y)["vgg"][1], expected)


def test_unusable_weights_are_refused_in_one_line(files, tmp_path):
    folder, _, _ = files

    def refused(name: str) -> str:
        with pytest.raises(ConfigError) as caught:
            Distances(PretrainedConfig(weights=name, vgg_weight=1.0))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in refused(str(tmp_path / "nothing.pth"))
    (tmp_path / "broken.safetensors").write_bytes(b"not tensors")
    assert "cannot be read" in refused(str(tmp_path / "broken.safetensors"))
    torch.save({"code": print}, tmp_path / "code.pth")
    assert "more than tensors" in refused(str(tmp_path / "code.pth"))
    assert "lacks the tensor 'features.0.weight'" in refused(str(folder / "heads.pth"))
    wrong = VGG16Features().state_dict() | {"features.0.weight": torch.zeros(1)}
    save_file(wrong, tmp_path / "wrong.safetensors")
    assert "has shape [1], not [64, 3, 3, 3]" in refused(str(tmp_path / "wrong.safetensors"))
