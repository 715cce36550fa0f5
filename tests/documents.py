"""Commands and examples that documents name, and what the command line knows of them.

A block below a comment `<!-- needs: ... -->` needs what a test has not (weights, a network).
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from command_line import portrait, speech, toy_model
from stableavatar.apps import cli
from stableavatar.checkpoints import layout

COMMANDS = typer.main.get_group(cli.app).commands


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and whether it can be run in a test."""

    language: str
    text: str
    runs: bool


def blocks(document: str) -> list[Block]:
    """All of a document."""
    pattern = r"(<!-- needs: [^>]+ -->\n)?```(\w*)\n(.*?)```"
    found = re.findall(pattern, document, re.DOTALL)
    return [Block(language, text, runs=not marker) for marker, language, text in found]


def reader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader would be: a portrait and a recording there, and a model `tiny`."""
    portrait(folder / "portrait.png")
    speech(folder / "speech.wav", 1.0)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(layout, "TINY", toy_model())
    return folder


def commands(text: str) -> list[list[str]]:
    """The commands of a block, those of a pipe one by one; of launchers such as torchrun, what they run."""
    parts = (part for line in text.replace("\\\n", " ").splitlines() for part in line.split(" | "))
    found = [words for part in parts if (words := shlex.split(part, comments=True))]
    return [
        words[words.index("-m") + 1 :] if words[0] in ("torchrun", "accelerate") else words for words in found
    ]


def parse(words: list[str]) -> typer.Context:
    """A command of this project, `stableavatar` first, with its arguments. Raises click's errors."""
    return COMMANDS[words[1]].make_context(words[1], words[2:])
