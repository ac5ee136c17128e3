"""Train a small class-conditional masked-token transformer on cached tokens, and sample from it.

python examples/tokens/train_tokens.py --tokens CACHE --output_dir runs/tokens

An example to read and to copy: MaskGIT (Chang et al. 2022). Some tokens of an image are hidden, and
the transformer names them from the others. To sample, all are hidden at first, and those that it is
surest of are kept, a few more in every pass. Guidance as in Muse (Chang et al. 2023, section 2.7).
A judge that knows real digits says how many it reads as the class asked for.
"""

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from first_stage.config.parsing import read_options
from first_stage.config.types import PositiveInt
from first_stage.errors import ConfigError, first_line, run_command
from first_stage.evaluation.grids import grid, save_png
from first_stage.files import write_folder, write_json
from first_stage.models.first_stage import FirstStage
from first_stage.models.loading import load_autoencoder
from first_stage.seeding import Purpose, generator
from latent_tools import LatentDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "digits"))
from score_digits import CLASSES, train_judge  # the other example's judge

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Options:
    """Train a masked-token transformer on a cache of tokens."""

    tokens: str = ""
    """The cache, as scripts/cache_latents.py --representation tokens writes it, with labels."""
    output_dir: str = "runs/tokens"
    """Folder for the transformer, the samples and the score."""
    first_stage: str | None = None
    """The first stage that made the cache; null: where it was then."""
    transformer: str | None = None
    """Sample from this one (another run's folder `transformer`) instead of training one."""
    steps: PositiveInt = 1500
    """Updates."""
    batch_size: PositiveInt = 64
    """Images per update."""
    learning_rate: float = 1e-3
    """Peak learning rate (AdamW); it grows over 100 steps and falls to 0 along a cosine."""
    width: PositiveInt = 128
    """Channels of the transformer, 32 to a head."""
    layers: PositiveInt = 4
    """Its blocks."""
    label_dropout: float = 0.1
    """Share of the samples whose class is hidden, for guidance."""
    samples: PositiveInt = 500
    """Images to sample at the end; a multiple of 10."""
    passes: PositiveInt = 12
    """Passes in which an image is sampled."""
    guidance_scale: float = 2.0
    """How far the class is followed; 1 is none."""
    temperature: float = 2.0
    """Of the noise on the confidence that decides which tokens stay; it falls to 0."""
    seed: int = 0
    """Seed of weights, order, masks and samples."""


class MaskedTransformer(nn.Module):
    """Names hidden tokens: a transformer that sees all others, with the class added to each.

    Args:
        codes: Number of codes; one more stands for a hidden token.
        places: Tokens of an image.
        classes: Number of classes; one more stands for none.
        width: Channels.
        layers: Blocks.
    """

    def __init__(self, codes: int, places: int, classes: int, width: int, layers: int):
        super().__init__()
        self.codes, self.places, self.classes = codes, places, classes
        self.token = nn.Embedding(codes + 1, width)
        self.place = nn.Parameter(0.02 * torch.randn(places, width))
        self.label = nn.Embedding(classes + 1, width)
        block = nn.TransformerEncoderLayer(
            width, width // 32, 4 * width, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), False)
        self.head = nn.Linear(width, codes)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Logits `(B, places, codes)` of tokens `(B, places)`, given labels `(B,)`."""
        hidden = self.token(tokens) + self.place + self.label(labels)[:, None]
        return self.head(self.blocks(hidden))


def main() -> None:
    """Train, sample, and print what the judge reads."""
    options = parse_options()
    dataset = LatentDataset(options.tokens, sample="tokens", seed=options.seed)
    codes, side = dataset.manifest.first_stage["codes"], dataset[0]["tokens"].shape
    torch.manual_seed(options.seed)
    model = MaskedTransformer(codes, side.numel(), CLASSES, options.width, options.layers)
    print(f"{len(dataset)} images of {side[0]} x {side[1]} tokens, {codes} codes")
    if options.transformer is None:
        train(model, dataset, options)
        write_folder(Path(options.output_dir) / "transformer", lambda folder: save_file(
            model.state_dict(), folder / WEIGHTS))  # fmt: skip
    else:
        load(model, Path(options.transformer) / WEIGHTS)
    stage = FirstStage(
        load_autoencoder(options.first_stage or dataset.manifest.first_stage["name"])
    )
    asked = torch.arange(options.samples) % CLASSES
    with torch.no_grad():
        tokens = torch.cat([sample(model, part, options, n)
                            for n, part in enumerate(asked.split(100))])  # fmt: skip
        parts = tokens.view(-1, *side).split(100)
        pictures = torch.cat([stage.decode_tokens(part) for part in parts]).clamp(-1, 1)
    score(pictures, asked.numpy(), options)


def load(model: MaskedTransformer, file: Path) -> None:
    """Take the weights of an earlier run with the same --width and --layers."""
    try:
        model.load_state_dict(load_file(file))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"--transformer {str(file.parent)!r} holds no {WEIGHTS} of this --width, --layers and "
            f"cache: {first_line(error)}"
        ) from error


def train(model: MaskedTransformer, dataset: LatentDataset, options: Options) -> None:
    """Teach it to name hidden tokens: cross-entropy over these alone (Chang et al. 2022, eq. 1)."""
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=0.01)
    bar = tqdm(batches(dataset, options), total=options.steps, desc="training", unit=" steps")
    for step, (tokens, labels) in enumerate(bar):
        draw = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        # The share that is hidden falls as in sampling: most often, most of the image.
        share = torch.cos(0.5 * math.pi * torch.rand(len(tokens), 1, generator=draw))
        hidden = torch.rand(tokens.shape, generator=draw) < share
        dropped = torch.rand(len(labels), generator=draw) < options.label_dropout
        logits = model(
            torch.where(hidden, model.codes, tokens), torch.where(dropped, model.classes, labels)
        )
        loss = F.cross_entropy(logits[hidden], tokens[hidden])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warm, decay = min(1.0, (step + 1) / 100), math.cos(0.5 * math.pi * step / options.steps)
        optimizer.param_groups[0]["lr"] = options.learning_rate * warm * decay
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix_str(f"{loss.item():.3f} nats per hidden token")


def batches(dataset: LatentDataset, options: Options) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens `(B, places)` and labels `(B,)`, epoch after epoch."""
    items = dataset.__getitems__(range(len(dataset)))
    tokens = torch.stack([item["tokens"].flatten() for item in items])
    labels = torch.tensor([item["label"] for item in items])
    done = 0
    for epoch in itertools.count():
        order = generator(options.seed, Purpose.ORDER, epoch).permutation(len(items))
        for chosen in torch.from_numpy(order).split(options.batch_size):
            if done == options.steps:
                return
            yield tokens[chosen], labels[chosen]
            done += 1


@torch.no_grad()
def sample(model: MaskedTransformer, labels: Tensor, options: Options, number: int = 0) -> Tensor:
    """Tokens `(B, places)` of the classes asked for (Chang et al. 2022, section 3.2).

    Args:
        model: The transformer.
        labels: `(B,)`.
        options: Passes, guidance and temperature.
        number: Of this batch, for its draws.
    """
    draw = torch.Generator().manual_seed(options.seed * 1_000_003 + number)
    tokens = torch.full((len(labels), model.places), model.codes)
    nobody = torch.full_like(labels, model.classes)
    for done in range(1, options.passes + 1):
        logits = model(tokens, labels)
        if options.guidance_scale != 1:
            free = model(tokens, nobody)
            logits = free + options.guidance_scale * (logits - free)
        chances = logits.softmax(-1)
        drawn = torch.multinomial(chances.flatten(0, 1), 1, generator=draw).view(tokens.shape)
        hidden = tokens == model.codes
        found = torch.where(hidden, drawn, tokens)
        sure = chances.gather(2, found[..., None])[..., 0].clamp_min(1e-9).log()
        gumbel = -torch.log(
            -torch.log(torch.rand(sure.shape, generator=draw).clamp(1e-9, 1 - 1e-7))
        )
        sure = sure + options.temperature * (1 - done / options.passes) * gumbel
        sure[~hidden] = torch.inf  # what is named stays
        left = int(model.places * math.cos(0.5 * math.pi * done / options.passes))
        tokens = found
        if done < options.passes and left:
            least = sure.topk(left, largest=False).indices
            tokens = found.scatter(1, least, model.codes)
    return tokens


def score(pictures: Tensor, asked: np.ndarray, options: Options) -> None:
    """Ask the judge, and write grid and score."""
    judge, real = train_judge(pictures.shape[-1])
    print(f"judge     reads {real:.1%} of the held-out real digits right")
    levels = ((pictures[:, 0] + 1) * 127.5).round() / 255
    read = judge.predict(levels.flatten(1).numpy())
    share = float((read == asked).mean())
    by_class = {str(c): float((read[asked == c] == c).mean()) for c in range(CLASSES)}
    print(f"samples   {share:.1%} of {len(pictures)} are read as the class asked for")
    print("by class  " + ", ".join(f"{c} {value:.0%}" for c, value in by_class.items()))
    output = Path(options.output_dir)
    save_png(grid([pictures[asked == c][:20] for c in range(CLASSES)]), output / "digits.png")
    about = {"judge_on_real_digits": real, "read_as_asked": share, "by_class": by_class}
    about |= {"samples": len(pictures), "guidance_scale": options.guidance_scale}
    write_json(output / "score.json", about)
    print(f"grid      {output}/digits.png (a row a class)\nscore     {output}/score.json")


def parse_options() -> Options:
    """Read the command line."""
    options = read_options(Options)
    if not options.tokens:
        raise ConfigError(
            "--tokens is missing: the folder that scripts/cache_latents.py --representation tokens "
            "wrote"
        )
    if options.samples % CLASSES:
        raise ConfigError(f"samples is {options.samples}; give a multiple of {CLASSES}")
    if options.width % 32:
        raise ConfigError(f"width is {options.width}; give a multiple of 32")
    return options


if __name__ == "__main__":
    run_command(main)
