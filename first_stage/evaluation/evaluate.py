"""Measure first stages: any diffusers autoencoder, on one process or several."""

from collections.abc import Callable, Iterable
from typing import Any

from PIL import Image

from first_stage.distributed.processes import Processes
from first_stage.errors import UserError
from first_stage.evaluation.code_pictures import draw_codes
from first_stage.evaluation.files import Evaluation
from first_stage.evaluation.images import ImageList
from first_stage.evaluation.measure import Measurement, Options
from first_stage.evaluation.pictures import Pair, add_reconstructions, choose_pairs, start_pairs
from first_stage.models.first_stage import as_first_stage


def evaluate(
    first_stages: Iterable[tuple[str, Any]],
    images: ImageList | Callable[[int], ImageList],
    options: Options | None = None,
    processes: Processes | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Measure first stages on images.

    Args:
        first_stages: Names and loaded diffusers autoencoders, or `FirstStage`s, in eval mode on
            their device; may be a generator, so that only one is in memory at a time.
        images: The images, or a function that gives them for a number of channels.
        options: What to measure.
        processes: The processes that share the work; all of them must call this. `None`: those of
            the job that was launched, or this one.
        seed: Seed of the choice of images, for the protocol.
        progress: Show a progress bar on the main process.

    Returns:
        The results. Pictures are on the main process only.

    Raises:
        UserError: When something is not an autoencoder of images, when no image can be decoded, or
            when the first stages read different numbers of channels.
    """
    options = options or Options()
    processes = processes or Processes()
    results: list[dict[str, Any]] = []
    pairs: list[Pair] = []
    codes: list[Image.Image | None] = []
    chosen: ImageList | None = None
    for name, autoencoder in first_stages:
        stage = as_first_stage(autoencoder, name)
        if chosen is None:
            chosen = images(stage.in_channels) if callable(images) else images
        read = int(chosen.described["channels"])
        if stage.in_channels != read:
            raise UserError(
                f"{name!r} takes images of {stage.in_channels} channels, but the images were read "
                f"into {read}"
                + (f" for {results[0]['name']!r}: evaluate them separately" if results else "")
            )
        measurement = Measurement(stage, chosen, options, processes)
        results.append(measurement.run(progress))
        if processes.is_main:
            if not pairs:
                pairs = start_pairs(chosen, choose_pairs(results[0]["per_image"], options.pairs))
            add_reconstructions(pairs, chosen, stage)
            shares = measurement.code_shares
            codes.append(
                None if shares is None else draw_codes(stage, shares, chosen.reading.display)
            )
    if chosen is None:
        raise UserError("no first stage was given")
    return Evaluation(_protocol(chosen, results, options, seed), results, pairs, codes)


def _protocol(
    images: ImageList, results: list[dict[str, Any]], options: Options, seed: int
) -> dict[str, Any]:
    return {
        **images.described,
        "images": len(results[0]["per_image"]),
        "unreadable_images": len(results[0]["unreadable"]),
        "seed": seed,
        "latents": "mode of the posterior",
        "padding": "last row and column repeated to a multiple of the downsample factor; "
        "cropped back",
        "pixels": "clamped to [-1, 1] and "
        + ("kept at full precision" if images.reading.value_range else "rounded to 8 bits")
        + ", originals and reconstructions alike",
        "weights": "float32",
        "psnr": "dB, peak 1, from the mean squared error of each image over all channels",
        "ssim": "Gaussian window of 11 pixels, sigma 1.5, mirrored border, mean over channels",
        "ms_ssim": "five scales, images of at least 176 pixels a side",
        "l1": "mean absolute error on the [-1, 1] scale",
        "high_frequency": "at least 0.25 cycles per pixel",
        "feature_distance": "1 - cosine of the feature vectors of an image and its reconstruction",
        "means": "over images",
        "probed_images": min(options.probed, len(results[0]["per_image"])),
    }
