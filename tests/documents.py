"""Commands that documents name, and what the command line knows of them."""

import shlex

import typer

from stableavatar.apps import cli

COMMANDS = typer.main.get_group(cli.app).commands


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
