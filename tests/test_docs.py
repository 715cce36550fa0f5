"""The documentation names what is there: its commands are parsed, its recipes and settings read, its files exist.
What its commands do is tested where they are."""

import re
from pathlib import Path

import pytest

from documents import commands, parse
from stableavatar.training.recipes import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def named(page: Path) -> list[list[str]]:
    """The commands of this project in a page's blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [words for text in blocks for words in commands(text) if words[0] == "stableavatar"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_known(page: Path) -> None:
    for words in named(page):
        context = parse(words)
        if "recipe" in context.params:
            load_recipe(ROOT / context.params["recipe"], context.params["settings"] or ())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_are_linked_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_there_are_commands() -> None:
    assert sum(len(named(page)) for page in PAGES) > 5
    assert {words[1] for words in named(ROOT / "docs" / "training.md")} >= {"prepare", "train", "convert"}
