"""Crops of photos as a data set for the yardstick: the photos of the comparison of objectives.

python -m experiments.diffusability.crops --more runs/debian-photos --output runs/photo-crops
"""

import argparse
from pathlib import Path

from PIL import Image

from experiments.objectives.experiment import CHANNELS, Photos, open_photos
from first_stage.data import open_image, pixels_from_images, pixels_of
from first_stage.errors import run_command
from first_stage.files import write_folder
from first_stage.seeding import Purpose, generator

SIDE = 64
EACH = 8
"""Crops of a photo to train on."""


def main() -> None:
    """Write the crops to train on, and those of other scenes to measure on."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--more", default=None, help="further photos to train on")
    parser.add_argument("--output", type=Path, default=Path("runs/photo-crops"))
    options = parser.parse_args()
    photos = open_photos(options.more, tile=SIDE)
    write_folder(options.output, lambda folder: write_crops(photos, folder))
    print(
        f"{len(photos.training) * EACH} crops of {len(photos.training)} photos in {options.output}/"
        f"training, {len(photos.held_out)} in {options.output}/held_out"
    )


def write_crops(photos: Photos, folder: Path) -> None:
    """PNG files of 64 x 64 pixels in `training` and `held_out`."""
    for part in ("training", "held_out"):
        (folder / part).mkdir(parents=True)
    for number in range(len(photos.training)):
        image = photos.training.read(number).image
        pixels = pixels_of(open_image(image, CHANNELS), CHANNELS)
        draw = generator(0, Purpose.SPLIT, 4, number)
        for crop in range(EACH):
            top, left = (int(draw.integers(0, size - SIDE + 1)) for size in pixels.shape[:2])
            part = pixels[top : top + SIDE, left : left + SIDE]
            Image.fromarray(part).save(folder / f"training/{number:04d}-{crop}.png")
    for number, pixels in enumerate(pixels_from_images(photos.held_out).numpy()):
        Image.fromarray(pixels).save(folder / f"held_out/{number:04d}.png")


if __name__ == "__main__":
    run_command(main)
