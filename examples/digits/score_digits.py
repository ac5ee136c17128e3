"""Ask a judge that knows real digits what it reads in sampled ones.

python examples/digits/score_digits.py --pipeline runs/digits/diffusion/pipeline

The judge is a support vector machine trained on the pixels of the built-in digits' training part;
how many of the held-out real digits it reads right is printed beside what it says of the samples.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import DiTPipeline
from PIL import Image
from sklearn.svm import SVC
from tqdm import trange

from first_stage.config.parsing import read_options
from first_stage.data import View, open_image, open_source, pixels_of
from first_stage.errors import ConfigError, run_command
from first_stage.evaluation.grids import grid, save_png
from first_stage.files import write_json

CLASSES = 10

Part = Literal["train", "validation"]


@dataclass(frozen=True)
class Options:
    """Sample digits and count those that a judge reads as the class asked for."""

    pipeline: str = ""
    """The pipeline's folder, trained on the built-in digits."""
    output_dir: str | None = None
    """Where digits.png and score.json go; null: beside the pipeline."""
    samples: int = 500
    """Digits to sample, as many of each class; a multiple of 10."""
    guidance_scale: float = 2.0
    """Classifier-free guidance; 1 is none."""
    inference_steps: int = 30
    """Steps of the sampler."""
    seed: int = 0
    """Seed of the samples."""
    batch_size: int = 100
    """Samples at once; a multiple of 10."""


def main() -> None:
    """Train the judge, sample, and print both numbers."""
    options = parse_options()
    pipeline = DiTPipeline.from_pretrained(options.pipeline)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    side = pipeline.transformer.config.sample_size * factor
    judge, real = train_judge(side)
    print(f"judge     reads {real:.1%} of the held-out real digits right")

    # Each row of the grid is a class.
    pictures = sample(pipeline, options)
    asked = np.arange(len(pictures)) % CLASSES
    read = judge.predict(pictures.reshape(len(pictures), -1))
    share = float((read == asked).mean())
    by_class = {str(c): float((read[asked == c] == c).mean()) for c in range(CLASSES)}
    print(f"samples   {share:.1%} of {len(pictures)} are read as the class asked for")
    print("by class  " + ", ".join(f"{c} {value:.0%}" for c, value in by_class.items()))

    output = Path(options.output_dir or Path(options.pipeline).parent)
    rows = [torch.from_numpy(pictures[asked == c][:20])[:, None] * 2 - 1 for c in range(CLASSES)]
    save_png(grid(rows), output / "digits.png")
    score = {
        "judge_on_real_digits": real,
        "read_as_asked": share,
        "by_class": by_class,
        "samples": len(pictures),
        "guidance_scale": options.guidance_scale,
        "inference_steps": options.inference_steps,
        "seed": options.seed,
    }
    write_json(output / "score.json", score)
    print(f"grid      {output}/digits.png (a row a class)\nscore     {output}/score.json")


def train_judge(side: int) -> tuple[SVC, float]:
    """A classifier of real digits, and the share of held-out ones that it reads right.

    Args:
        side: Side of the pictures, in pixels.
    """
    images, labels = real_digits("train", side)
    judge = SVC(C=10.0, gamma="scale").fit(images.reshape(len(images), -1), labels)
    images, labels = real_digits("validation", side)
    return judge, float(judge.score(images.reshape(len(images), -1), labels))


def real_digits(part: Part, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The built-in digits as the first stage sees them: `(N, side, side)` in [0, 1], labels."""
    source = open_source("digits", split=part)
    view = View(side, side)
    samples = [source.read(n) for n in range(len(source))]
    seen = [view.apply(open_image(sample.image, 1))[0] for sample in samples]
    images = np.stack([pixels_of(image, 1)[..., 0] for image in seen]).astype(np.float32) / 255.0
    return images, np.array([sample.columns["label"] for sample in samples])


def sample(pipeline: DiTPipeline, options: Options) -> np.ndarray:
    """Digits of the classes 0 to 9 in turn: `(N, side, side)` in [0, 1], rounded to 8 bits."""
    device = pipeline.transformer.device
    parts: list[Image.Image] = []
    for start in trange(0, options.samples, options.batch_size, desc="sampling", unit=" batches"):
        count = min(options.batch_size, options.samples - start)
        made = pipeline(
            class_labels=[n % CLASSES for n in range(count)],
            guidance_scale=options.guidance_scale,
            num_inference_steps=options.inference_steps,
            generator=torch.Generator(device).manual_seed(options.seed + start),
        )
        parts += made.images
    return np.stack([np.asarray(p.convert("L")) for p in parts]).astype(np.float32) / 255.0


def parse_options() -> Options:
    """Read the command line."""
    options = read_options(Options)
    if not (Path(options.pipeline) / "model_index.json").exists():
        raise ConfigError(f"pipeline {options.pipeline!r} is no diffusers pipeline's folder")
    for name, value in (("samples", options.samples), ("batch_size", options.batch_size)):
        if value < CLASSES or value % CLASSES:
            raise ConfigError(f"{name} is {value}; give a multiple of {CLASSES}")
    return options


if __name__ == "__main__":
    run_command(main)
