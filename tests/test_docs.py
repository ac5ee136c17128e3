"""The pages: links lead somewhere, reference pages are current, commands and snippets work."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from first_stage.__main__ import COMMANDS

PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")],
    key=str,
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
VALUES = {"/data/my-images": "photos", "DATA": "photos", "FOLDER": "photos"}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site's generator make them."""
    found = set()
    for title in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", title.lower())
        found.add(plain.strip().replace(" ", "-"))
    return found


def commands(page: Path) -> list[list[str]]:
    """Every `first-stage ...` of a page's shell blocks, alone or behind a launcher."""
    found = []
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language not in ("bash", "sh"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"^(?!#).*?\bfirst[-_]stage (?=[a-z-])(.*)", line)
            if match is not None:
                words = shlex.split(match[1].replace("'", ""), comments=True)
                ends = [k for k, word in enumerate(words) if word in (">", "|", "||", "&&", ";")]
                found.append(words[: min(ends, default=len(words))])
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if page.is_relative_to(ROOT / "docs"):
            assert target.is_relative_to(ROOT / "docs"), f"{link} is not part of the site"
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_in_the_navigation():
    def files(entry):
        if isinstance(entry, str):
            return [entry]
        return [f for part in (entry.values() if isinstance(entry, dict) else entry)
                for f in files(part)]  # fmt: skip

    listed = files(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    there = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(there)


def test_the_first_page_leads_to_every_other():
    home = ROOT / "docs/index.md"
    linked = {(home.parent / link).resolve() for link in LINK.findall(prose(home))}
    assert {page for page in PAGES if page.is_relative_to(ROOT / "docs")} - linked == {home}


def test_reference_pages_are_current():
    program = (
        "import generate_reference as g, sys\n"
        "sys.exit('\\n'.join(n for n, t in g.pages().items()"
        " if g.tidy(t) != (g.FOLDER / n).read_text('utf-8')) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "docs", capture_output=True, text=True,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'docs'}", "PATH": "", "HOME": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, (
        f"not current: {result.stderr}. Run: python docs/generate_reference.py"
    )


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


ALL_COMMANDS = [
    pytest.param(line, id=f"{name(page)}-{k}")
    for page in PAGES
    for k, line in enumerate(commands(page))
]


def test_pages_have_commands():
    assert len(ALL_COMMANDS) > 20


@pytest.mark.parametrize("line", ALL_COMMANDS)
def test_commands_of_the_pages_are_understood(line):
    """Every option that a page uses exists, and takes the value that it is given."""
    command, *rest = line
    if command in ("--help", "--version"):
        return
    assert command in COMMANDS
    rest = [VALUES.get(word, word) for word in rest]
    if "--help" in rest:
        return
    if command == "train":
        from first_stage.config import parse_config

        parse_config(rest)
    elif command == "cache":
        from first_stage.commands.cache import parse_options

        parse_options(rest)
    elif command == "export":
        from first_stage.commands.export import parse_options

        parse_options(rest)
    elif command == "evaluate":
        from first_stage.commands.evaluate import parse

        parse(rest)
    elif command == "recipes":
        from first_stage.recipes import recipe_file

        assert not rest or recipe_file(*rest).exists()
    else:
        assert command == "latents"
        from latent_tools import __main__ as latents

        assert callable(getattr(latents, rest[0]))
