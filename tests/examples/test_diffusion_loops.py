"""Every loop of the guide runs, as it stands there."""

import re

import pytest
import torch
from autoencoders import build_autoencoder
from conftest import ROOT, picture

from first_stage.data.sources import ListSource, Sample
from latent_tools import CacheOptions, precompute

GUIDE = ROOT / "docs" / "guides" / "diffusion-loops.md"


def loops() -> dict[str, str]:
    """Heading to code."""
    parts = re.split(r"^## (.*)$", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    headings = zip(parts[::2], parts[1::2], strict=True)
    found = {
        heading: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for heading, text in headings
    }
    assert all(len(blocks) == 1 for blocks in found.values())
    return {heading: blocks[0] for heading, blocks in found.items()}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A cache with captions in two shapes, or one."""

    def make(buckets=None):
        torch.manual_seed(0)
        vae = build_autoencoder(3, 4, (8, 16), 1, 4, False, True, 16).eval()
        sides = [(16, 16), (32, 16)] if buckets else [(16, 16)]
        samples = [
            Sample(f"{n:02d}", picture(n, *sides[n % len(sides)]), {"caption": f"number {n}"})
            for n in range(16)
        ]
        options = CacheOptions(resolution=16, resize=16, buckets=buckets, unit_size=4)
        precompute(vae, "x", ListSource("pictures", samples), "my_latents", options)

    monkeypatch.chdir(tmp_path)
    return make


@pytest.mark.parametrize("heading", list(loops()))
def test_a_loop_of_the_guide(place, heading):
    place("16x16,16x32" if heading == "Several shapes" else None)
    seen = []

    def loss_of(model, clean, condition):
        seen.append((tuple(clean.shape), condition))
        return model(clean).square().mean()

    model = torch.nn.Conv2d(4, 4, 1)
    before = model.weight.detach().clone()
    names = {
        "epochs": 3, "first_epoch": 1, "state": None, "rank": 0, "world": 1, "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1), "loss_of": loss_of,
        "encode_text": lambda captions: [len(text) for text in captions],
    }  # fmt: skip
    loop = loops()[heading]
    if "def collate" not in loop:  # that of the captions
        captions = loops()["Captions"]
        names["torch"] = torch
        exec(captions[captions.index("def collate") : captions.index("loader =")], names)
    exec(loop, names)
    epochs = 2 if "first_epoch" in loop else 3
    assert sum(shape[0] for shape, _ in seen) == 16 * epochs
    assert not torch.equal(before, model.weight)
    shapes = {shape[1:] for shape, _ in seen}
    expected = {(4, 8, 8), (4, 8, 16)} if heading == "Several shapes" else {(4, 8, 8)}
    assert shapes == expected
    has_condition = heading != "No condition"
    assert all((condition is not None) == has_condition for _, condition in seen)
