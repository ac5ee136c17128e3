"""The wheel: what is in it, and that it works installed elsewhere, without the repository."""

import os
import re
import site
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY, picture

import first_stage


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--disable-pip-version-check", "--wheel-dir", folder, ROOT], check=True,
    )  # fmt: skip
    (made,) = folder.glob("*.whl")
    return made


def test_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
        points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"first_stage", "latent_tools"}
    recipes = {f"first_stage/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert recipes <= names
    sources = {
        str(path.relative_to(ROOT))
        for package in ("first_stage", "latent_tools")
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".css", ".js") or path.name == "py.typed"
    }
    assert sources <= names
    assert any(name.endswith("LICENSE") for name in names)
    assert "first-stage = first_stage.__main__:main" in points
    assert f"\nVersion: {first_stage.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata


def test_hooks_and_constraints_name_the_same_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (rev,) = [repo["rev"] for repo in hooks["repos"] if "ruff" in repo["repo"]]
    assert f"\nruff=={rev.removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text()


def test_lower_bounds_are_the_oldest_versions():
    """Every `>=` of what is installed with the package or its tests, but for tools and types."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["demo"], *extras["test"]]
    for name in ("tracking", "evaluation", "comparison", "tiff", "heic", "jxl", "dicom", "jpeg"):
        needed += extras[name]
    found = dict(re.findall(r"^([\w-]+)(?:\[\w+\])?>=([\d.]+)$", "\n".join(needed), re.MULTILINE))
    for tool in ("import-linter", "ruff", "mypy"):
        del found[tool]
    text = (ROOT / "constraints-oldest.txt").read_text()
    oldest = dict(re.findall(r"^([\w-]+)==([\d.]+)$", text, re.MULTILINE))
    assert {name.lower() for name in oldest} == {name.lower() for name in found}
    for name, version in oldest.items():
        bound = found.get(name, found.get(name.lower()))
        parts, bounds = ([int(n) for n in v.split(".")] for v in (version, bound))
        length = max(len(parts), len(bounds))
        padded = [n + [0] * (length - len(n)) for n in (parts, bounds)]
        assert padded[0] == padded[1], f"{name} {version} is not the bound {bound}"


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel, which borrows every other package from this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps",
         "--no-index", "--disable-pip-version-check", wheel], check=True,
    )  # fmt: skip
    found = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    borrowed = "\n".join(path for path in site.getsitepackages() if Path(path).is_dir())
    Path(found.stdout.strip(), "borrowed.pth").write_text(borrowed + "\n")
    return folder / "venv/bin"


@pytest.mark.slow
def test_the_commands_run_from_an_empty_folder(elsewhere, tmp_path):
    """Train, look, export, cache and evaluate, with the lines that the commands print."""
    away = {"PYTHONPATH", "VIRTUAL_ENV", "WORLD_SIZE", "ACCELERATE_USE_CPU"}
    environment = {name: value for name, value in os.environ.items() if name not in away}
    environment |= {"PATH": f"{elsewhere}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def shell(line: str) -> str:
        result = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    where = shell("python -c 'import first_stage; print(first_stage.__file__)'")
    assert Path(where.strip()).is_relative_to(elsewhere.parent)
    for number in range(8):
        (tmp_path / "my images").mkdir(exist_ok=True)
        picture(number).save(tmp_path / f"my images/{number}.png")
    assert "kl_f8_c16" in shell("first-stage recipes")
    tiny = " ".join(f"--{name} '{value}'" for name, value in TINY.items())
    said = shell(
        f"first-stage train --config demo --data.path 'my images' {tiny} "
        "--data.late_resolution 20 --data.late_steps 1 "
        "--validation.resolution 16 --output_dir runs/mine --train.warmup_steps 0 "
        "--train.decay_steps 0 --train.encoder_steps null --critic.start_step 1 "
        "--loss.learned.start_step 1 --loss.adversarial.start_step 1"
    )
    cache = re.search(r"^ +(first-stage cache .*)$", said, re.MULTILINE)[1]
    assert "'my images'" in cache
    look = re.search(r"next: (first-stage latents info \S+),", shell(cache))[1]
    assert "8 samples" in shell(look)
    assert "units are whole" in shell("first-stage latents verify runs/mine/latents")
    shell("first-stage export --first_stage runs/mine/export --fold_statistics --output folded")
    assert (tmp_path / "folded/diffusion_pytorch_model.safetensors").exists()
    shell(
        "first-stage evaluate --first_stage runs/mine/export folded --data.path 'my images' "
        "--data.resolution 16 --features none --output compared"
    )
    assert (tmp_path / "compared/report.html").exists()
