"""Tiny real images, autoencoders and runs that the tests share."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from first_stage.config import Config, parse_config

ROOT = Path(__file__).resolve().parent.parent

TINY = {
    "data.resolution": 16,
    "data.workers": 0,
    "data.validation_share": 0.25,
    "model.block_out_channels": "[8,16]",
    "model.layers_per_block": 1,
    "model.norm_num_groups": 4,
    "model.mid_block_attention": "false",
    "critic.width": 4,
    "critic.layers": 1,
    "train.max_steps": 4,
    "train.batch_size": 4,
    "train.learning_rate": 1e-3,
    "train.log_every": 1,
    "train.checkpoint_every": 100,
    "train.tracker": "none",
    "validation.every": 100,
    "validation.images": 2,
    "validation.pictures": 2,
    "export.images": 8,
}


def pytest_configure():
    # Tests run side by side: one thread each, in this process and in those it starts.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps its state in singletons; every test begins without."""
    yield
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


def picture(seed: int, width: int = 24, height: int = 20, channels: int = 3) -> Image.Image:
    """Smooth random colours with some texture: like a photo, small."""
    draw = np.random.default_rng(seed)
    coarse = draw.uniform(0, 255, (4, 4, channels)).astype(np.uint8)
    mode = Image.fromarray(coarse.squeeze())
    smooth = np.asarray(mode.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    noisy = smooth + draw.normal(0, 12, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of 12 small colour pictures."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(12):
        picture(index).save(folder / f"{index:02d}.png")
    return folder


def arguments(output: Path, data: Path | str, **overrides: object) -> list[str]:
    """Command line of a tiny run; double underscores in names stand for dots."""
    fields = {**TINY, "output_dir": output, "data.path": data}
    fields |= {name.replace("__", "."): value for name, value in overrides.items()}
    line = []
    for name, value in fields.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        line += [f"--{name}", "null" if value is None else text]
    return line


@pytest.fixture
def tiny(tmp_path: Path, images: Path):
    """Builds the configuration of a tiny run."""

    def build(**overrides: object) -> Config:
        overrides.setdefault("output_dir", tmp_path / "run")
        output = Path(str(overrides.pop("output_dir")))
        data = str(overrides.pop("data__path", images))
        return parse_config(arguments(output, data, **overrides))

    return build


def run_script(*line: object, env: dict[str, str] | None = None, timeout: float = 300):
    """Run one of the repository's scripts as users do, from its root."""
    return subprocess.run(
        [sys.executable, *map(str, line)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def disk(tmp_path):
    """Mounts small file systems; `disk(kilobytes, options)` is the folder."""
    mounted: list[Path] = []

    def mount(kilobytes: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        options = f"size={kilobytes}k"
        try:
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True
            )
        except OSError as error:
            pytest.skip(f"no small file system can be mounted here: {error}")
        if done.returncode:
            pytest.skip(f"no small file system can be mounted here: {done.stderr.decode()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
