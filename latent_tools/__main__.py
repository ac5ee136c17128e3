"""`first-stage latents info|verify|stats|preview|gc|export CACHE`.

The same as `python -m latent_tools info ...`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from first_stage.command_line import command_line
from first_stage.config.parsing import parser_class, with_values
from first_stage.config.types import NonNegativeInt, PositiveInt
from first_stage.errors import ConfigError, run_command
from first_stage.files import writing
from latent_tools import maintenance as tools
from latent_tools.format.files import CacheError
from latent_tools.format.manifest import Manifest
from latent_tools.format.plan import Plan, committed_units


def info(cache: str) -> None:
    """Say what is in a cache and how far it is.

    Args:
        cache: The cache's folder.
    """
    print("\n".join(tools.describe(Path(cache))))


def verify(cache: str, release: bool = False, data: bool = False, path: str | None = None) -> None:
    """Check every shard's checksum, and every commit against the plan.

    Ends with an error (exit code 2) where anything is damaged, changed or not committed yet.

    Args:
        cache: The cache's folder.
        release: Set the commits of damaged units aside; the next launch encodes just these again.
        data: Check too that the images are still those that were encoded.
        path: Where the images are now, if they moved.
    """
    folder = Path(cache)
    manifest = Manifest.load(folder)
    found: list[tools.Damage] = []
    units = sum(1 for _ in committed_units(folder))
    for damage in tqdm(tools.damages(folder), total=units, desc="verifying", unit=" units"):
        if damage is not None:
            found.append(damage)
    for damage in found:
        print(f"unit {damage.unit}: {damage.file} {damage.reason}")
    changed = list(tools.changed_samples(folder, path)) if data else []
    for name, reason in changed:
        print(f"sample {name}: {reason}")
    if found and release:
        for damage in found:
            print(f"set aside: {tools.release(folder, damage.unit)}")
        print(f"next, to encode only these units again: {tools.redo_command(manifest)}")
        return
    if found:
        raise CacheError(
            f"{len(found)} of {units} units are damaged; to encode only these again: "
            f"{command_line('latents', 'verify', folder, '--release')}, then "
            f"{tools.redo_command(manifest)}"
        )
    if changed:
        raise CacheError(
            f"{len(changed)} samples of the data are not those that were encoded: restore them, "
            f"or take them in with {tools.redo_command(manifest)} --update"
        )
    if how_to_go_on := tools.unfinished(folder):
        whole = f"; these are whole{', and so is their data' if data else ''}" if units else ""
        planned = len(Plan.load(folder).units)
        raise CacheError(f"{units} of {planned} units are committed{whole}. {how_to_go_on}")
    print(f"{units} units are whole{', and so is the data' if data else ''}")


def stats(cache: str) -> None:
    """Print the latents' statistics per channel.

    Args:
        cache: The cache's folder.
    """
    print("\n".join(tools.statistics_table(Path(cache))))


def preview(
    cache: str,
    output: str = "preview.png",
    count: PositiveInt = 8,
    path: str | None = None,
    first_stage: str | None = None,
) -> None:
    """Picture samples: originals above, decoded latents below.

    Args:
        cache: The cache's folder.
        output: The picture's file.
        count: How many samples.
        path: Where the images are now, if they moved.
        first_stage: The first stage's folder or hub id, if it moved.
    """
    names = tools.preview(Path(cache), Path(output), int(count), path, first_stage)
    print(f"{output}: originals above, decoded latents below: {', '.join(names)}")


def gc(cache: str, delete: bool = False) -> None:
    """List what killed launches left behind; nothing is deleted unless asked for.

    Args:
        cache: The cache's folder.
        delete: Delete what is listed.
    """
    found = tools.leftovers(Path(cache), delete)
    size = sum(item.size for item in found)
    for item in found:
        print(f"{item.path}: {item.reason}")
    if not found:
        print("nothing is left over")
    elif delete:
        print(f"deleted {len(found)} files, {size / 2**20:.1f} MiB")
    else:
        again = command_line("latents", "gc", cache, "--delete")
        print(f"{len(found)} files, {size / 2**20:.1f} MiB; to delete them: {again}")


def export(
    cache: str,
    format: str | None = None,
    output: str | None = None,
    draw: Literal["posterior", "mean"] | None = None,
    seed: NonNegativeInt = 0,
    any_pixel_range: bool = False,
) -> None:
    """Write a cache in the layout that another project's trainer reads; resumes where it stopped.

    Args:
        cache: The cache's folder.
        format: The layout: what `export` without it lists.
        output: The folder to write into; for kohya that of the images.
        draw: For layouts without moments: one draw from each posterior (the default where there
            is one), or its mean.
        seed: Seed of the draws.
        any_pixel_range: Export although the trainers decode to another pixel range.
    """
    from latent_tools.export import export_cache
    from latent_tools.export.formats import FORMATS

    if format is None or output is None:
        raise ConfigError(
            f"export needs --format ({', '.join(FORMATS)}) and --output, the folder to write into"
        )
    print("\n".join(export_cache(cache, format, output, draw, int(seed), any_pixel_range)))


_SWITCHES = dict.fromkeys(("--release", "--data", "--delete", "--any_pixel_range"), "true")
"""What these flags mean without a value."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: Command line without the program's name; `None` reads `sys.argv`.
    """
    import jsonargparse

    given = list(sys.argv[1:] if arguments is None else arguments)
    with writing(None, lambda: "Nothing of the cache is lost by it"):
        jsonargparse.auto_cli(
            [info, verify, stats, preview, gc, export],
            args=with_values(given, _SWITCHES),
            parser_class=parser_class(),
            prog="first-stage latents",
            as_positional=True,
        )


if __name__ == "__main__":
    run_command(main)
