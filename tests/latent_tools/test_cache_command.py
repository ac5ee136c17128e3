"""The command and the tools as users run them: through the launcher, in processes of their own."""

import json
import re

import pytest
import torch
from cache_helpers import cache, launch, make_vae, photo, run_tool, shard_hashes, write_photos
from PIL import Image

from first_stage.commands import cache as command
from first_stage.commands.cache import parse_options
from first_stage.errors import ConfigError, UserError
from latent_tools import LatentDataset
from latent_tools.__main__ import main as tool
from latent_tools.format.files import CacheError
from latent_tools.format.manifest import Manifest


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache made by two processes, its data and its first stage."""
    root = tmp_path_factory.mktemp("command")
    write_photos(root / "data", 23)
    (root / "data" / "class0" / "broken.png").write_bytes(b"no")
    make_vae().save_pretrained(root / "vae")
    root.joinpath("result").write_text(json.dumps(vars(launch(2, *arguments(root)))))
    return root


def arguments(root, output="c"):
    return [
        "--first_stage", str(root / "vae"), "--data.path", str(root / "data"),
        "--output", str(root / output), "--unit_size", "5", "--batch_size", "2", "--flip",
        "--data.workers", "0",
    ]  # fmt: skip


def test_two_processes_make_one_cache(made):
    result = json.loads((made / "result").read_text())
    assert result["returncode"] == 0, result["stderr"]
    lines = result["stdout"].splitlines()
    said = [line for line in lines if not line.startswith("[Gloo]")]  # torch 2.8 does
    assert said[0] == "2 processes on cpu"
    assert "24 samples in 5 of 5 units to encode" in lines
    encoded = [line for line in lines if "samples in" in line and line.startswith("process")]
    assert sorted(encoded) == [
        "process 0: 14 samples in 3 units encoded, 0 of 5 units were done before",
        "process 1: 10 samples in 2 units encoded, 0 of 5 units were done before",
    ]
    # The process that commits the last unit ends with these; the other one may print after it.
    assert any(line.startswith("next: ") and " latents info " in line for line in lines)
    assert any("1 samples failed" in line and "failures.parquet" in line for line in lines)
    dataset = LatentDataset(made / "c", expect=str(made / "vae"))
    assert len(set(dataset.ids)) == len(dataset) == 23
    # Without data.resolution: what the first stage was trained at.
    assert dataset.manifest.preprocessing["resolution"] == 16


def test_another_launch_finds_everything_done(made, capsys):
    command.main(arguments(made))
    printed = capsys.readouterr().out
    assert "0 samples in 0 units encoded, 5 of 5 units were done before" in printed


def test_stale_weights_are_refused_and_a_new_decoder_is_not(made, capsys):
    """The weights change in place, under the same path."""
    changed = make_vae()
    with torch.no_grad():
        changed.encoder.down_blocks[0].resnets[0].conv1.bias[0] += 1e-3
    before = shard_hashes(made / "c")
    changed.save_pretrained(made / "vae")
    try:
        result = launch(1, *arguments(made))
        assert result.returncode != 0
        (line,) = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
        manifest = Manifest.load(made / "c")
        assert manifest.first_stage["encoder_sha256"][:16] in line
        assert "encoder.down_blocks.0.resnets.0.conv1.bias" in line
        assert 'cache_latents.py", line' not in result.stderr  # no traceback of ours
        other = make_vae()
        with torch.no_grad():
            other.decoder.conv_in.bias += 1
        other.save_pretrained(made / "vae")
        command.main(arguments(made))
        assert "the decoder differs from the cache's" in capsys.readouterr().out
        assert shard_hashes(made / "c") == before
    finally:
        make_vae().save_pretrained(made / "vae")


class TestTools:
    def test_info_and_stats(self, made, capsys):
        tool(["info", str(made / "c")])
        printed = capsys.readouterr().out
        for text in ("AutoencoderKL", "moments in float16, flipped", "5 of 5", "23, 1 failed"):
            assert text in printed
        tool(["stats", str(made / "c")])
        printed = capsys.readouterr().out
        stats = Manifest.load(made / "c").statistics
        assert f"{stats['mean_std'][3]:.8f}" in printed
        assert f"{stats['scaling_factor']:.8f}" in printed

    def test_verify_names_a_flipped_byte_and_only_that_unit_is_encoded_again(self, made, capsys):
        tool(["verify", str(made / "c"), "--data"])
        before = shard_hashes(made / "c")
        damaged = made / "c" / "shards" / "b16x16-u000003.safetensors"
        content = bytearray(damaged.read_bytes())
        content[-1] ^= 1
        damaged.write_bytes(content)
        result = run_tool("verify", str(made / "c"))
        assert result.returncode == 2
        assert "unit 3: shards/b16x16-u000003.safetensors has sha256" in result.stdout
        assert result.stdout.count("unit ") == 1
        assert "--release" in result.stderr
        assert re.search(r"first.stage cache --first_stage", result.stderr)
        assert "Traceback" not in result.stderr
        tool(["verify", str(made / "c"), "--release"])
        capsys.readouterr()
        command.main(arguments(made))
        printed = capsys.readouterr().out
        assert "5 samples in 1 units encoded, 4 of 5 units were done before" in printed
        assert shard_hashes(made / "c") == before

    def test_verify_tells_changed_data(self, made, capsys):
        image = made / "data" / "class1" / "00003.png"
        content = image.read_bytes()
        photo(99).save(image)
        try:
            with pytest.raises(UserError, match="1 samples of the data are not those"):
                tool(["verify", str(made / "c"), "--data"])
            assert "sample class1/00003.png: has other content" in capsys.readouterr().out
        finally:
            image.write_bytes(content)

    def test_what_stopped_for_broken_files_is_not_whole_and_says_how_to_go_on(
        self, made, tmp_path, capsys
    ):
        data, output = tmp_path / "flat", tmp_path / "c"
        data.mkdir()
        for number in range(8):
            photo(number).save(data / f"{number}.png")
        (data / "x.png").write_bytes(b"no")
        line = ["--first_stage", str(made / "vae"), "--data.path", str(data), "--output",
                str(output), "--data.workers", "0", "--batch_size", "4"]  # fmt: skip
        with pytest.raises(UserError, match=r"1 of 9 samples .* 0 of 1 units are committed"):
            command.main(line)
        capsys.readouterr()
        tool(["info", str(output)])
        stopped, last = capsys.readouterr().out.splitlines()[-2:]
        assert "1 of 9 samples cannot be encoded" in stopped
        assert re.search(r"not finished; .*larger --data\.max_broken: .*cache --first_stage", last)
        result = run_tool("verify", str(output), "--data")
        assert result.returncode == 2
        assert result.stdout == ""
        told = result.stderr.splitlines()[-1]
        assert "0 of 1 units are committed. The cache is not finished" in told
        assert "1 of 9 samples cannot be encoded" in told
        assert re.search(r"to go on: .*cache --first_stage", told)

        with pytest.raises(UserError, match="2 of 3 units are committed and stay"):
            command.main([*line, "--unit_size", "4"])
        with pytest.raises(UserError) as caught:
            tool(["verify", str(output), "--data"])
        assert "2 of 3 units are committed; these are whole, and so is their data. " in str(
            caught.value
        )
        with pytest.raises(UserError, match=r"2 of 3 units are committed; these are whole\. The"):
            tool(["verify", str(output)])

        command.main([*line, "--unit_size", "4", "--data.max_broken", "0.2"])
        capsys.readouterr()
        tool(["info", str(output)])
        assert "earlier launch" not in capsys.readouterr().out
        tool(["verify", str(output), "--data"])
        assert "3 units are whole, and so is the data" in capsys.readouterr().out
        assert not (output / "stopped.json").exists()

    def test_preview_shows_originals_above_decoded(self, made, tmp_path):
        tool(["preview", str(made / "c"), "--output", str(tmp_path / "p.png"), "--count", "3"])
        picture = Image.open(tmp_path / "p.png")
        assert picture.size == (48, 32)
        name = LatentDataset(made / "c").ids[0]
        original = Image.open(made / "data" / name)
        assert picture.crop((0, 0, 16, 16)).tobytes() == original.tobytes()

    def test_gc_lists_and_deletes_only_when_asked(self, made, capsys):
        stray = made / "c" / "shards" / ".tmp-1-b16x16-u000009.safetensors"
        stray.write_bytes(b"x")
        lost = made / "c" / "shards" / "b16x16-u000077.safetensors"
        lost.write_bytes(b"x")
        tool(["gc", str(made / "c")])
        printed = capsys.readouterr().out
        assert str(stray) in printed
        assert str(lost) in printed
        assert stray.exists()
        before = set(shard_hashes(made / "c"))
        tool(["gc", str(made / "c"), "--delete"])
        assert set(shard_hashes(made / "c")) == before - {stray.name, lost.name}
        tool(["verify", str(made / "c")])

    def test_mistakes_end_with_one_line(self, tmp_path):
        for given in (["info", str(tmp_path)], ["info"], ["gone", "x"], ["gc", str(tmp_path)]):
            with pytest.raises(UserError) as caught:
                tool(given)
            assert len(str(caught.value).splitlines()) == 1
        result = run_tool("stats", str(tmp_path))
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1


class TestOptions:
    base = ("--first_stage", "a", "--data.path", "b", "--output", "c")

    def test_switches_need_no_value(self):
        options = parse_options([*self.base, "--flip", "--buckets", "--compile"])
        assert (options.flip, options.buckets, options.compile) == (True, "auto", True)
        options = parse_options([*self.base, "--flip", "false", "--buckets", "16x32"])
        assert (options.flip, options.buckets) == (False, "16x32")

    def test_types(self):
        options = parse_options([*self.base, "--columns", "[a,b]", "--data.max_broken", "1e-3"])
        assert options.columns == ("a", "b")
        assert options.data.max_broken == 0.001

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["--output", "c", "--data.path", "b"], "--first_stage is missing"),
            ([*base, "--dtype", "float8"], "dtype"),
            ([*base, "--nope", "1"], "nope"),
            ([*base, "--batch_size", "x"], "batch_size"),
        ],
    )
    def test_mistakes_name_the_option(self, given, message):
        with pytest.raises(ConfigError, match=message):
            parse_options(given)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be an int above 0"),
        ({"resolution": -16}, "resolution is -16; it must be an int above 0"),
        ({"unit_size": -1}, "unit_size is -1; it must be an int of 0 or above"),
        ({"workers": -1}, "workers is -1; it must be an int of 0 or above"),
        ({"max_broken": 1.5}, "max_broken is 1.5; it must be a float from 0 to 1"),
        ({"dtype": "int4"}, "dtype is int4; it must be a choice of float16"),
    ],
)
def test_options_set_in_python_are_refused_like_flags(tmp_path, changes, words):
    write_photos(tmp_path / "data", 1)
    with pytest.raises(CacheError, match=words):
        cache(tmp_path / "data", tmp_path / "cache", **changes)
    if "dtype" not in changes:
        ((name, value),) = changes.items()
        flag = f"data.{name}" if name in ("resolution", "workers", "max_broken") else name
        with pytest.raises(ConfigError, match=words):
            parse_options([f"--{flag}={value}"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["preview", "c", "--count", "0"], "count is 0; it must be an int above 0"),
        (["export", "c", "--seed", "-1"], "seed is -1; it must be an int of 0 or above"),
    ],
)
def test_the_tools_refuse_what_is_out_of_range(line, words):
    with pytest.raises(ConfigError, match=words):
        tool(line)
