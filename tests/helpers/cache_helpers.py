"""Small real autoencoders and images, and launches through the launcher that users use."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from autoencoders import build_autoencoder
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from first_stage import files
from first_stage.data import open_source
from first_stage.models.bottlenecks import Gaussian
from first_stage.models.families import Family, register_family
from latent_tools import CacheError, CacheOptions, LatentDataset, Outcome, precompute
from latent_tools.maintenance import leftovers

ROOT = Path(__file__).resolve().parents[2]


def make_vae(seed: int = 0, channels: int = 3) -> AutoencoderKL:
    """A tiny AutoencoderKL (f = 2) whose pipelines scale and shift."""
    torch.manual_seed(seed)
    vae = build_autoencoder(channels, 4, (8, 16), 1, 4, False, True, 16)
    vae.register_to_config(scaling_factor=1.7, shift_factor=0.3)
    return vae.eval()


def photo(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """Smooth random colours of a (width, height)."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def numbered(number: int, side: int = 8) -> Image.Image:
    """An image that says its number: red + 256 green, and blue only in its right half."""
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = number % 256, number // 256
    pixels[:, side // 2 :, 2] = 255
    return Image.fromarray(pixels)


class NumberReader(nn.Module):
    """An encoder whose latents are the pixels, averaged over 2 x 2: they say the image's number."""

    def __init__(self, logvar: float = -30.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.logvar = logvar
        self.config = {"in_channels": 3, "scaling_factor": 1.0}

    def encode(self, images: Tensor) -> Tensor:
        mean = nn.functional.avg_pool2d(images * self.weight, 2)
        return torch.cat([mean, torch.full_like(mean, self.logvar)], 1)


class Numbers(Family):
    """The family of `NumberReader`: a class from outside the library."""

    name, model_class = "numbers", NumberReader

    def build(self, config, sample_size):
        return NumberReader()

    def bottleneck(self, model, config=None):
        return Gaussian()

    def to_code(self, model, images):
        return model.encode(images)

    def downsample_factor(self, model):
        return 2

    def latent_channels(self, model):
        return 3

    def in_channels(self, model):
        return model.config["in_channels"]

    def last_layer(self, model):
        return model.weight


register_family(Numbers())


def number_of(latents: Tensor) -> tuple[int, bool]:
    """The number in a latent of `NumberReader`, and whether its image was flipped."""
    pixels = ((latents + 1.0) * 127.5).round()
    number = int(pixels[0, 0, 0]) + 256 * int(pixels[1, 0, 0])
    return number, bool(pixels[2, 0, 0] > pixels[2, 0, -1])


def write_photos(folder: Path, count: int, first: int = 0, side: int = 16) -> None:
    """Photos as PNG files in two class folders."""
    for number in range(first, first + count):
        path = folder / f"class{number % 2}" / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(number, (side, side)).save(path)


def options(**changes) -> CacheOptions:
    """Options for tiny images."""
    return CacheOptions(**{"resolution": 16, "resize": 16, "batch_size": 4, **changes})


def cache(folder: Path, output: Path, vae: nn.Module | None = None, **changes) -> Outcome:
    """Precompute in this process."""
    source = open_source(str(folder))
    return precompute(vae or make_vae(), "test", source, output, options(**changes))


def shard_hashes(output: Path) -> dict[str, str]:
    """SHA-256 of every shard by name."""
    files = sorted((output / "shards").iterdir())
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def launch_command(
    processes: int, *arguments: str, script: Path = ROOT / "scripts" / "cache_latents.py"
) -> tuple[list[str], dict[str, str]]:
    """Command and environment of `accelerate launch scripts/cache_latents.py` on the CPU."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--num_processes", str(processes)]
    if processes > 1:
        launcher += ["--multi_gpu", "--main_process_port", "0"]
    return [*launcher, str(script), *arguments], {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }


def launch(processes: int, *arguments: str) -> subprocess.CompletedProcess:
    """Run the command through the launcher."""
    command, environment = launch_command(processes, *arguments)
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1200
    )


def run_tool(*arguments: str) -> subprocess.CompletedProcess:
    """Run `python -m latent_tools`."""
    return subprocess.run(
        [sys.executable, "-m", "latent_tools", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def stand_still(after_units: int | None = None, log: Path | None = None) -> None:
    """Begin no further unit of this process after so many: it waits to be killed.

    Args:
        after_units: How many; `None` lets it go on.
        log: Each unit is written down here whenever some of its pixels go into the encoder.
    """
    from latent_tools.build.encode import ChunkEncoder

    original, begun = ChunkEncoder.start, set()

    def start(self, chunk):
        if chunk.unit not in begun and len(begun) == after_units:
            _wait_for_the_kill()
        begun.add(chunk.unit)
        if log is not None:
            with log.open("a") as file:
                file.write(f"{chunk.unit}\n")
        return original(self, chunk)

    ChunkEncoder.start = start


def stand_still_in_the_write_of(name: str, said: Path) -> None:
    """Stop, to be killed, when a file is written and synced but does not have its name yet.

    Args:
        name: Its name.
        said: Where the temporary file's name is written down, once it is there.
    """
    original = files._sync_file

    def sync(path):
        original(path)
        if path.name.startswith(files.TEMPORARY) and path.name.endswith(f"-{name}"):
            files.write_text(said, path.name)
            _wait_for_the_kill()

    files._sync_file = sync


def _wait_for_the_kill() -> None:
    while True:
        time.sleep(1.0)


def encode_logged(
    data: Path, output: Path, log: Path, units: int | None = None, held: str | None = None
) -> None:
    """Precompute, writing down each unit whose pixels go into the encoder.

    Args:
        data: The photos.
        output: The cache.
        log: The units; beside it, as `.err`, what is printed, and as `.held` what is held.
        units: Stand still after so many.
        held: Stand still in the write of this file.
    """
    # Progress bars, and what a decode worker says when the process that it talks to is killed.
    with log.with_suffix(".err").open("a") as printed:
        os.dup2(printed.fileno(), 2)
    stand_still(units, log)
    if held is not None:
        stand_still_in_the_write_of(held, log.with_suffix(".held"))
    torch.set_num_threads(1)
    # As in a launch of its own: of a server's child the workers would come from another server,
    # which imports everything anew and outlives whoever is killed.
    multiprocessing.set_start_method("fork", force=True)
    while True:
        try:
            cache(data, output, unit_size=8, batch_size=2, flip=True, workers=1)
            return
        except CacheError as error:  # while gc has the lock
            if "another launch" not in str(error):
                raise
            time.sleep(0.01)


def tidy_all_the_time(output: Path, deleted: Path) -> None:
    """`gc --delete`, again and again, writing down what was deleted."""
    while True:
        try:
            found = leftovers(output, delete=True)
        except (CacheError, OSError):  # no cache yet, or a launch that fills it
            found = []
        with deleted.open("a") as file:
            file.writelines(f"{item.path.name}\n" for item in found)
        time.sleep(0.5)  # a launch must find the lock free between two of them


def eleven_photos(root: Path) -> Path:
    """A cache of eleven photos in three units."""
    write_photos(root / "data", 11)
    cache(root / "data", root / "c", make_vae(), unit_size=4)
    return root / "c"


def draws(folder: Path, epoch: int) -> dict[str, float]:
    """The latents' sums in an epoch, by id."""
    dataset = LatentDataset(folder, flip=0.0)
    items = dataset.items(range(len(dataset)), epoch)
    return {item["id"]: item["latents"].sum().item() for item in items}
