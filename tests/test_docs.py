"""The documentation names what is there: its commands are parsed, its recipes and settings read, its files exist.
What its commands do is tested where they are."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from stableavatar.apps import cli
from stableavatar.training.recipes import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def commands(page: Path) -> Iterator[list[str]]:
    """The commands of this project in the blocks of a page; of torchrun's and the like, what they run."""
    for text in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "stableavatar" in words:
                yield words[words.index("stableavatar") + 1 :]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_known(page: Path) -> None:
    for words in commands(page):
        context = COMMANDS[words[0]].make_context(words[0], list(words[1:]))
        if "recipe" in context.params:
            load_recipe(ROOT / context.params["recipe"], context.params["settings"] or ())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_are_linked_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_there_are_commands() -> None:
    assert sum(len(list(commands(page))) for page in PAGES) > 5
    assert {words[0] for words in commands(ROOT / "docs" / "training.md")} >= {"prepare", "train", "convert"}
