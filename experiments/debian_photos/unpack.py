"""Free photos that come with Debian packages, for those who have none at hand."""

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from experiments.debian_photos.qt_resources import read_resources
from first_stage.command_line import command_line
from first_stage.config.parsing import plain_parser
from first_stage.errors import DataError, UserError
from first_stage.files import write_folder

_ACTIVITIES = "gcompris/src/activities"
PHOTOS: dict[str, Sequence[str]] = {
    "gcompris-qt-data": [
        f"{_ACTIVITIES}/{pattern}"
        for pattern in (
            "categorization/resource/images/fishes/*.webp",
            "categorization/resource/images/monuments/*.webp",
            "categorization/resource/images/renewable/*.webp",
            "clickgame/resource/sea*.webp",
            "details/resource/image/*_background.webp",
            "erase/resource/*.webp",
            "explore_farm_animals/resource/animals/*.webp",
            "explore_monuments/resource/*/*.webp",
            "explore_world_animals/resource/animals/*.webp",
            "explore_world_music/resource/music/*.webp",
        )
    ],
    "lomiri-wallpapers-16.04": ["usr/share/backgrounds/*_by_*.jpg"],
    "tuxpaint-data": ["usr/share/tuxpaint/templates/*.jpg"],
}
"""Package to where its photos are."""
_NOT = (
    # Paintings and drawings.
    *("*/Eglise_*", "*/Gogh4_*", "*/Portrait*", "*/VanGogh*", "*/Van_Gogh*", "*/VincentVanGogh*"),
    *("*/middleeast.webp", "*/analogpattern_*"),
    # Scenes of the comparison's held-out photos.
    *("*/eiffelTower.webp", "*/TourEiffel_*", "*/NDP_*"),
)


def main() -> None:
    """Unpack the photos into a folder."""
    parser = plain_parser("Unpack free photos that come with Debian packages.")
    parser.add_argument(
        "--output", type=str, default="runs/debian-photos", help="Folder for the photos."
    )
    output = Path(parser.parse_args().output)
    photos = unpack_photos(output)
    print(
        f"{len(photos)} photos in {output}, whose they are in {output}/copyright\n"
        "Compare objectives on them and those of the Python packages:\n"
        f"  python -m experiments.objectives --small --more {output}\n"
        "Train on them:\n"
        f"  {command_line('train', '--config', 'kl_f4', '--data.path', output)}"
    )


def unpack_photos(output: Path) -> list[Path]:
    """Download the packages, without installing them, and unpack their photos.

    The packages' copyright files, which say whose photos they are, come along.

    Args:
        output: Folder for the photos; it must not exist yet.

    Returns:
        The photos.

    Raises:
        UserError: When the folder is there already, or a package cannot be had here.
    """
    if output.exists():
        raise UserError(f"--output {str(output)!r} is there already: choose another or delete it")
    names: list[str] = []

    def write(target: Path) -> None:
        """Fill the folder, package by package."""
        (target / "copyright").mkdir()
        for package, patterns in PHOTOS.items():
            (archive,) = downloaded.glob(f"{package}_*.deb")
            _run(["dpkg-deb", "--extract", str(archive), package], downloaded)
            for path, content in photos_below(downloaded / package, patterns):
                # One plain name: what a package calls its files does not decide where they go.
                plain = path.removeprefix(f"{_ACTIVITIES}/").replace("/", "-")
                names.append(f"{package}-{plain}")
                (target / names[-1]).write_bytes(content)
            notice = downloaded / package / "usr/share/doc" / package / "copyright"
            (target / "copyright" / f"{package}.txt").write_bytes(notice.read_bytes())

    with tempfile.TemporaryDirectory() as folder:
        downloaded = Path(folder)
        _run(["apt-get", "download", *PHOTOS], downloaded)
        write_folder(output, write)
    return [output / name for name in names]


def photos_below(folder: Path, patterns: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Photos in an unpacked package, in resource files as well.

    Args:
        folder: Of the package.
        patterns: Which paths are photos, in shell's notation.

    Yields:
        Path inside the package or its resource file, and content.
    """

    def wanted(path: str) -> bool:
        """Whether a path is that of a photo to take."""
        return any(fnmatchcase(path, p) for p in patterns) and not any(
            fnmatchcase(f"/{path}", p) for p in _NOT
        )

    for file in sorted(f for f in folder.rglob("*") if f.is_file() and not f.is_symlink()):
        if file.suffix == ".rcc":
            yield from ((path, content) for path, content in read_resources(file) if wanted(path))
        elif wanted(path := file.relative_to(folder).as_posix()):
            yield path, file.read_bytes()


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(
            f"{command[0]} is not here: the photos come from packages of Debian 12 or later; "
            "elsewhere give your own"
        ) from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DataError(f"{' '.join(command)}: {last}. Try: sudo apt-get update") from error
