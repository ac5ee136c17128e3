"""A judge of labelled images: a small network that reads their class, and what it looks at.

It is trained on the real images once for all first stages. Its features tell samples from real
images where an ImageNet network sees little, as in digits; how many of the held-out real images it
reads right is printed beside what it says of samples.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from first_stage.files import write_atomic

_WIDTHS = (32, 64, 64)
_AT_ONCE = 256


class Judge(nn.Module):
    """Strided convolutions, an average over places, a linear layer.

    Args:
        channels: Of the images.
        classes: How many there are.
    """

    def __init__(self, channels: int, classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((channels, *_WIDTHS), _WIDTHS, strict=False):
            layers += [
                nn.Conv2d(before, width, 3, stride=2, padding=1),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(_WIDTHS[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Features `(B, 64)` of images `(B, C, H, W)` in [-1, 1]."""
        return self.body(images).mean((2, 3))

    @torch.no_grad()
    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(N, 64)`, and the classes read `(N,)`."""
        parts = [self(some) for some in images.split(_AT_ONCE)]
        features = torch.cat(parts)
        return features, self.head(features).argmax(1)


def trained_judge(file: Path, images: Tensor, labels: Tensor, steps: int = 1000) -> Judge:
    """The judge in a file, or a new one, which is then written there.

    Args:
        file: A safetensors file.
        images: `(N, C, H, W)` in [-1, 1], real ones.
        labels: `(N,)`, their classes from 0.
        steps: Updates of 64 images each.
    """
    judge = Judge(images.shape[1], int(labels.max()) + 1)
    if file.exists():
        judge.load_state_dict(load_file(file))
        return judge.eval()
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = Judge(images.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (64,), generator=draw)
        loss = F.cross_entropy(judge.head(judge(images[rows])), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().contiguous() for name, value in judge.state_dict().items()}
    write_atomic(file, lambda path: save_file(state, path))
    return judge.eval()
