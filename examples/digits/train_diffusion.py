"""Train a small class-conditional diffusion transformer on a latent cache.

accelerate launch examples/digits/train_diffusion.py --latents CACHE --output_dir runs/diffusion

An example to read and to copy. It learns the velocity of a DDPM (Salimans & Ho 2022, section 4)
with classifier-free guidance (Ho & Salimans 2022), and saves a `DiTPipeline` that diffusers loads
alone. docs/guides/diffusion-loops.md shows the loop with several shapes, with captions, without a
condition, behind `accelerator.prepare` and with a `StatefulDataLoader`.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from first_stage.config.parsing import read_options
from first_stage.errors import ConfigError, run_command
from first_stage.files import write_folder
from first_stage.handover.folding import fold_statistics
from first_stage.models.loading import load_autoencoder
from first_stage.seeding import Purpose, hashed_bits, standard_normals
from first_stage.training.checkpoint import (
    Snapshot,
    find_checkpoint,
    flatten_optimizer,
    list_checkpoints,
    load_checkpoint,
    restore_optimizer,
    save_checkpoint,
    set_aside,
)
from latent_tools import BucketBatchSampler, LatentDataset
from latent_tools.format.manifest import check_weights

NULL_CLASS = 1000  # the label that DiTPipeline gives to what it guides away from


@dataclass(frozen=True)
class Options:
    """Train a class-conditional diffusion transformer on a latent cache."""

    latents: str = ""
    """The cache, as first-stage cache writes it, with labels."""
    output_dir: str = "runs/diffusion"
    """Folder for checkpoints and the pipeline."""
    first_stage: str | None = None
    """The first stage that made the cache; null: where it was then."""
    label: str = "label"
    """The cache's column with the class, an integer from 0 to 999."""
    steps: int = 2000
    """Updates."""
    batch_size: int = 64
    """Latents per update, over all processes."""
    learning_rate: float = 1e-3
    """Peak learning rate (AdamW); it grows over warmup_steps and falls to 0 along a cosine."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    ema_decay: float = 0.995
    """Decay of the average of the weights, which the pipeline gets; warms up as (1+k)/(10+k)."""
    label_dropout: float = 0.1
    """Share of the samples whose label is hidden, for guidance."""
    layers: int = 6
    """Transformer blocks."""
    heads: int = 6
    """Attention heads, of 32 channels each."""
    patch_size: int = 2
    """Latents per token along a side."""
    seed: int = 0
    """Seed of weights, order and noise."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    resume: bool = False
    """Go on from the newest checkpoint in output_dir."""
    workers: int = 0
    """Processes that read the cache."""
    precision: Literal["no", "bf16"] = "no"
    """Autocast type of the transformer; weights and optimizer stay float32."""


FREE = ("latents", "output_dir", "first_stage", "checkpoint_every", "resume", "workers")
"""Options that may change when a run goes on: they change no result."""


def main() -> None:
    """Train, save the pipeline, say what comes next."""
    options = parse_options()
    accelerator = Accelerator(mixed_precision=options.precision)
    accelerator.print(f"{accelerator.num_processes} process(es) on {accelerator.device.type}")
    dataset = LatentDataset(options.latents, normalize="channel", seed=options.seed)
    stage = dataset.manifest.first_stage
    autoencoder = load_autoencoder(options.first_stage or stage["name"], stage["revision"])
    check_weights(dataset.manifest, autoencoder, dataset.path)
    names = class_names(dataset, options.label)
    if options.batch_size % accelerator.num_processes:
        raise ConfigError(
            f"batch_size {options.batch_size} does not divide over "
            f"{accelerator.num_processes} processes"
        )
    output = Path(options.output_dir)
    checkpoint, remarks = find_checkpoint(output, "latest") if options.resume else (None, [])
    for remark in remarks:
        accelerator.print(remark)
    if not options.resume and (list_checkpoints(output) or (output / "pipeline").exists()):
        raise ConfigError(
            f"output_dir {str(output)!r} holds a run: add --resume true, or choose another folder"
        )

    torch.manual_seed(options.seed)
    transformer = make_transformer(options, dataset)
    # Cosine noise levels (Nichol & Dhariwal 2021) suit small images: the linear ones spend half of
    # the steps where nothing is left to see.
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    model = accelerator.prepare_model(transformer)
    optimizer = torch.optim.AdamW(
        transformer.parameters(), options.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    ema = EMAModel(transformer.parameters(), decay=options.ema_decay, foreach=True)
    ema.to(accelerator.device)
    about = identity(options, dataset)
    start = restore(checkpoint, about, transformer, optimizer, ema) if checkpoint else 0
    accelerator.print(f"{len(dataset)} latents in {len(names)} classes, from step {start}")
    if accelerator.is_main_process:
        set_aside(output, start)  # damaged checkpoints that were passed over

    bar = tqdm(total=options.steps, initial=start, disable=not accelerator.is_main_process)
    losses = torch.zeros((), device=accelerator.device)
    stream = itertools.islice(batches(dataset, options, accelerator, start), options.steps - start)
    for step, (latents, labels) in enumerate(stream, start):
        noise, times, hidden = draws(options, step, tuple(latents.shape[1:]), accelerator)
        latents = latents.to(accelerator.device)
        labels = torch.where(hidden, NULL_CLASS, labels.to(accelerator.device))
        noisy = scheduler.add_noise(latents, noise, times)
        target = scheduler.get_velocity(latents, noise, times)
        predicted = model(noisy, timestep=times, class_labels=labels).sample
        loss = (predicted - target).square().mean()
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = options.learning_rate * rate_share(step, options)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(transformer.parameters())

        losses += loss.detach()
        bar.update()
        done = step + 1
        if done % 50 == 0:
            bar.set_postfix_str(f"loss {losses.item() / 50:.4f}", refresh=False)
            losses.zero_()
        if accelerator.is_main_process and (
            done % options.checkpoint_every == 0 or done == options.steps
        ):
            save(output, done, about, transformer, optimizer, ema)
    bar.close()

    if accelerator.is_main_process:
        # The transformer makes latents with mean 0 and variance 1 per channel: so does this stage.
        folded = fold_statistics(autoencoder, dataset.stats["mean"], dataset.stats["std"])
        with averaged(transformer, ema):
            pipeline = DiTPipeline(transformer=transformer, vae=folded, scheduler=scheduler)
            if "class" in dataset.column_names:
                pipeline.register_to_config(id2label=names)  # for pipeline.get_label_ids(["cat"])
            write_folder(output / "pipeline", lambda path: pipeline.save_pretrained(path))
        print(
            f"pipeline  {output}/pipeline\n"
            "Sample from it with diffusers:\n"
            "  from diffusers import DiTPipeline\n"
            f'  pipeline = DiTPipeline.from_pretrained("{output}/pipeline")\n'
            f"  pipeline(class_labels=[{min(names)}], num_inference_steps=30).images[0]"
        )
    accelerator.wait_for_everyone()  # one that leaves early would strand a peer that still saves
    accelerator.end_training()


def make_transformer(options: Options, dataset: LatentDataset) -> DiTTransformer2DModel:
    """A diffusion transformer (Peebles & Xie 2023) for the cache's latents, in eval mode."""
    channels, height, width = dataset[0]["latents"].shape
    dataset.of_shape(None)  # refuses a cache with several shapes
    if height != width or height % options.patch_size:
        raise ConfigError(
            f"the latents are {height} x {width}; DiTTransformer2DModel takes squares that "
            f"patch_size {options.patch_size} divides"
        )
    transformer = DiTTransformer2DModel(
        num_attention_heads=options.heads,
        attention_head_dim=32,
        in_channels=channels,
        out_channels=channels,  # DiTPipeline fails on the null that would mean the same
        num_layers=options.layers,
        sample_size=height,
        patch_size=options.patch_size,
        num_embeds_ada_norm=NULL_CLASS,  # and one more for the null class itself
    )
    # As in the paper every block begins as the identity and the output as 0; diffusers leaves both
    # to the caller.
    for block in transformer.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
        torch.nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    for layer in (transformer.proj_out_1, transformer.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    # In train mode each block hides labels on its own, so that hardly any sample is without a label
    # in all of them, and the null class is never learned. We hide labels ourselves, once a sample.
    return transformer.eval()


def batches(
    dataset: LatentDataset, options: Options, accelerator: Accelerator, start: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's latents and labels from step `start` on, epoch after epoch."""
    rank, world = accelerator.process_index, accelerator.num_processes
    # A step trains on a whole batch: what is left of an epoch over comes in another one.
    sampler = BucketBatchSampler(
        dataset, options.batch_size // world, seed=options.seed, rank=rank, world=world,
        drop_last=True,
    )  # fmt: skip
    if len(sampler) == 0:
        raise ConfigError(
            f"batch_size {options.batch_size} is more than the {len(dataset)} samples of the cache"
        )

    def collate(items: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        return (
            torch.stack([item["latents"] for item in items]),
            torch.tensor([item[options.label] for item in items]),
        )

    for epoch in itertools.count(start // len(sampler)):
        sampler.set_epoch(epoch)  # anew: order, draws from the posterior, flips
        rows = list(sampler)[max(0, start - epoch * len(sampler)) :]
        yield from DataLoader(
            dataset, batch_sampler=rows, collate_fn=collate, num_workers=options.workers
        )


def draws(
    options: Options, step: int, shape: tuple[int, ...], accelerator: Accelerator
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, time and whether the label is hidden, of this process's part of the batch.

    Each is a function of seed, step and the sample's place in the global batch: a process draws its
    own part alone, and several draw what one would.
    """
    share = options.batch_size // accelerator.num_processes
    places = range(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    bits = hashed_bits(options.seed, Purpose.NOISE, step, map(str, places))
    noise = standard_normals(bits[:, 0], shape)
    low, high = (bits[:, 1] >> np.uint64(shift) & np.uint64(0xFFFFFFFF) for shift in (0, 32))
    times = torch.from_numpy((low % np.uint64(1000)).astype(np.int64))
    hidden = torch.from_numpy(high * 2.0**-32 < options.label_dropout)
    device = accelerator.device
    return noise.to(device), times.to(device), hidden.to(device)


def rate_share(step: int, options: Options) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to 0."""
    warm = min(1.0, (step + 1) / max(1, options.warmup_steps))
    return warm * 0.5 * (1.0 + float(np.cos(np.pi * step / options.steps)))


def class_names(dataset: LatentDataset, column: str) -> dict[int, str]:
    """Label to name, for the labels in the cache."""
    if column not in dataset.column_names:
        raise ConfigError(
            f"label is {column!r}, but the cache has the columns: "
            f"{', '.join(dataset.column_names) or 'none'}"
        )
    labels = dataset.column(column).to_pylist()
    names = dataset.column("class").to_pylist() if "class" in dataset.column_names else labels
    found = dict(zip(labels, map(str, names), strict=True))
    for label in found:
        if not isinstance(label, int) or not 0 <= label < NULL_CLASS:
            raise ConfigError(
                f"column {column!r} has {label!r}; DiTPipeline takes classes from 0 to 999"
            )
    return dict(sorted(found.items()))


def identity(options: Options, dataset: LatentDataset) -> dict[str, Any]:
    """What a run depends on: if any of it changed, the resumed run would be neither."""
    chosen = {k: v for k, v in dataclasses.asdict(options).items() if k not in FREE}
    return chosen | {
        "samples": len(dataset),
        "mean": dataset.stats["mean"],
        "std": dataset.stats["std"],
        "encoder": dataset.manifest.first_stage["encoder_sha256"],
    }


def check_identity(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with other options, or with a cache that has grown or changed."""
    for name, value in now.items():
        if then.get(name) == value:
            continue
        if name in {field.name for field in dataclasses.fields(Options)}:
            raise ConfigError(
                f"{name} is {value}, but the run in {str(folder)!r} was started with "
                f"{then.get(name)}: resume with that, or choose another output_dir"
            )
        raise ConfigError(
            f"latents has another {name} ({value}) than when the run in {str(folder)!r} was "
            f"started ({then.get(name)}): a cache that has grown normalizes and orders its samples "
            "anew; use the one it was started with, or choose another output_dir"
        )


def save(
    output: Path,
    step: int,
    about: dict[str, Any],
    transformer: DiTTransformer2DModel,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel,
) -> None:
    """Write a checkpoint: weights, their average, the optimizer."""
    tensors = {
        "transformer": dict(transformer.state_dict()),
        "optimizer": flatten_optimizer(optimizer, "transformer"),
    }
    snapshot = Snapshot(step, tensors, {"ema_steps": ema.optimization_step, "about": about})
    save_checkpoint(output, snapshot, lambda: averaged(transformer, ema), keep=2)


@contextlib.contextmanager
def averaged(transformer: DiTTransformer2DModel, ema: EMAModel) -> Iterator[DiTTransformer2DModel]:
    """The transformer with its averaged weights, for the time being."""
    ema.store(transformer.parameters())
    ema.copy_to(transformer.parameters())
    try:
        yield transformer
    finally:
        ema.restore(transformer.parameters())


def restore(
    folder: Path,
    about: dict[str, Any],
    transformer: DiTTransformer2DModel,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel,
) -> int:
    """Take back what `save` wrote; the steps done."""
    snapshot = load_checkpoint(folder)
    check_identity(folder, snapshot.state["about"], about)
    transformer.load_state_dict(snapshot.tensors["transformer"])
    restore_optimizer(optimizer, snapshot.tensors["optimizer"], "transformer")
    averaged = DiTTransformer2DModel.from_pretrained(folder / "ema", use_safetensors=True)
    device = next(transformer.parameters()).device
    ema.shadow_params = [p.detach().clone().to(device) for p in averaged.parameters()]
    ema.optimization_step = snapshot.state["ema_steps"]
    return snapshot.step


def parse_options() -> Options:
    """Read the command line."""
    options = read_options(Options, switches={"--resume": "true"})
    if not options.latents:
        raise ConfigError("--latents is missing: the folder that first-stage cache wrote")
    return options


if __name__ == "__main__":
    run_command(main)
