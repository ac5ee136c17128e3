"""Disks that are full or cannot be written, told in a line by every command."""

import subprocess

import pytest
from cache_helpers import cache, make_vae, write_photos

from first_stage.commands.cache import main as cache_command
from first_stage.errors import UserError
from first_stage.files import WriteError
from latent_tools.__main__ import main as tool
from latent_tools.format.plan import committed_units


@pytest.fixture
def made(disk, tmp_path):
    """Data, first stage, and a cache on a small disk with something left over in it."""
    write_photos(tmp_path / "data", 6)
    make_vae().save_pretrained(tmp_path / "vae")
    folder = disk(4000)
    cache(tmp_path / "data", folder / "cache", unit_size=3)
    (folder / "cache" / "shards" / ".tmp-0-b16x16-u000009.safetensors").write_bytes(b"half")
    return folder / "cache"


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("command", ["gc", "preview", "verify", "export", "cache"])
def test_a_read_only_disk_is_told_in_a_line(made, tmp_path, command):
    commands = {
        "gc": ["gc", str(made), "--delete"],
        "preview": ["preview", str(made), "--output", str(made / "p.png"),
                    "--first_stage", str(tmp_path / "vae")],
        "verify": ["verify", str(made), "--release"],
        "export": ["export", str(made), "--format", "fast-dit", "--output", str(made / "out")],
        "cache": encode(tmp_path, made),
    }  # fmt: skip
    if command == "verify":
        shard = next((made / "shards").glob("b*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-1])
    write_photos(tmp_path / "data", 2, first=6)  # so that there is something to encode
    subprocess.run(["mount", "-o", "remount,ro", str(made.parent)], check=True)
    run = cache_command if command == "cache" else tool
    with pytest.raises(UserError, match="Read-only file system") as error:
        run(commands[command])
    one_line(error)


def encode(tmp_path, output) -> list[str]:
    return [
        "--first_stage", str(tmp_path / "vae"), "--data.path", str(tmp_path / "data"),
        "--output", str(output), "--data.workers", "0", "--unit_size", "3",
    ]  # fmt: skip


def test_a_full_disk_is_told_in_a_line_and_the_cache_goes_on(disk, tmp_path):
    write_photos(tmp_path / "data", 60, side=64)
    make_vae().save_pretrained(tmp_path / "vae")
    folder = disk(400)
    line = [*encode(tmp_path, folder / "cache"), "--data.resolution", "64"]
    with pytest.raises(WriteError, match="No space left on device; free some space") as error:
        cache_command(line)
    assert "Complete units are kept: start the same command to go on" in one_line(error)
    assert list(committed_units(folder / "cache"))
    subprocess.run(["mount", "-o", "remount,size=20000k", str(folder)], check=True)
    cache_command(line)
    assert len(list(committed_units(folder / "cache"))) == 20


def test_a_preview_says_what_it_cannot_be(made, tmp_path):
    with pytest.raises(UserError, match=r"name a \.png"):
        tool(["preview", str(made), "--output", str(tmp_path / "p.xyz"),
              "--first_stage", str(tmp_path / "vae")])  # fmt: skip
    tool(["preview", str(made), "--output", str(tmp_path / "new" / "p.png"),
          "--first_stage", str(tmp_path / "vae")])  # fmt: skip
    assert (tmp_path / "new" / "p.png").exists()
