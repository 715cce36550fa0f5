"""The tables of docs/commands.md and docs/recipes.md: every option of every command and every key of a recipe, out of what
declares them.

python tests/reference_tables.py
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import griffe
from typer.core import TyperArgument, TyperCommand, TyperOption

from documents import COMMANDS
from stableavatar.evaluation.report import put_between
from stableavatar.options import choices_of
from stableavatar.training.recipes import Recipe

DOCS = Path(__file__).parents[1] / "docs"
OF_COMMANDS, OF_RECIPES = DOCS / "commands.md", DOCS / "recipes.md"
START, END = "<!-- written by tests/reference_tables.py -->", "<!-- end of what is written -->"
_WORDS = {bool: "`true` or `false`", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


def of_commands() -> str:
    """A section a command, a table for each group of its help."""
    return "\n\n".join(of_command(name, command) for name, command in COMMANDS.items())


def of_command(name: str, command: TyperCommand) -> str:
    """A command's arguments and options."""
    assert command.help is not None
    given = [it for it in command.params if isinstance(it, TyperArgument)]
    groups: dict[str, list[str]] = {}
    for it in command.params:
        if isinstance(it, TyperOption) and not it.hidden and it.name != "help":
            groups.setdefault(it.rich_help_panel or "", []).append(_row(it))
    needed = "".join(f" {it.metavar}" if it.required else f" [{it.metavar}]" for it in given)
    parts = [f"## {name}\n\n`stableavatar {name}{needed}`: {' '.join(command.help.split())}"]
    parts += ["\n".join(f"- `{it.metavar}`: {it.help}" for it in given)] if given else []
    for title, rows in groups.items():
        parts.append("\n".join([f"| {title or 'option'} | values | default | |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _row(option: TyperOption) -> str:
    kind = option.type_descriptor.annotation
    alone = option.is_bool_flag or option.count
    values = "" if alone else _alternatives(kind) or (option.metavar or _plain(kind)).replace("|", " or ")
    default = "" if alone else _shown(option.default)
    flags = ", ".join(f"`{it}`" for it in option.opts)
    return f"| {flags} | {values} | {'to be given' if option.required else default} | {option.help} |"


def of_recipes() -> str:
    """A table for each part of a recipe."""
    parts = []
    for path, kind in _sections(Recipe, ""):
        said, types = _attributes(kind), get_type_hints(kind)
        rows = [
            f"## `{path}`\n" if path else "## The parts\n",
            "| key | values | default | |",
            "|---|---|---|---|",
        ]
        for f in dataclasses.fields(kind):
            inner = any(dataclasses.is_dataclass(it) for it in _members(types[f.name]))
            values = _alternatives(types[f.name]) or ("see below" if inner else _plain(types[f.name]))
            given = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
            default = _shown(f.default) if given and not inner else "" if given else "to be given"
            rows.append(f"| `{f.name}` | {values} | {default} | {_in_yaml(said[f.name])} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _sections(kind: type[Any], path: str) -> Iterator[tuple[str, type[Any]]]:
    """A dataclass and those within it, with the keys that lead to them."""
    yield path, kind
    for name, hint in get_type_hints(kind).items():
        for inner in _members(hint):
            if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                yield from _sections(inner, f"{path}.{name}".removeprefix("."))


def _attributes(kind: type[Any]) -> dict[str, str]:
    """What a class's documentation says of its fields, for readers who have not its sources."""
    found: dict[str, str] = {}
    for section in griffe.Docstring(kind.__doc__ or "").parse("google"):
        if isinstance(section, griffe.DocstringSectionAttributes):
            found |= {it.name: " ".join(it.description.split()) for it in section.value}
    return {name: re.sub(r" \(spec [^)]*\)", "", text) for name, text in found.items()}


def _in_yaml(text: str) -> str:
    """With the word that a recipe has for a value of None."""
    return re.sub(r"\bNone(?=:)", "`null`", text)


def _members(hint: Any) -> list[Any]:
    """A type and the types within it."""
    return [hint, *(inner for part in get_args(hint) for inner in _members(part))]


def _alternatives(hint: Any) -> str:
    """What there is to choose from; nothing where any value goes."""
    found = [choice for it in _members(hint) for choice in choices_of(it)]
    return ", ".join(f"`{it}`" for it in dict.fromkeys(found))


def _plain(hint: Any) -> str:
    """A type in words."""
    members = _members(hint)
    if any(get_origin(it) is dict for it in members):
        return "keys and values"
    words = next(_WORDS[it] for it in members if it in _WORDS)
    return f"several: {words}" if any(get_origin(it) in (list, tuple) for it in members) else words


def _shown(value: Any) -> str:
    """A default as it is written."""
    if value in (None, (), dataclasses.MISSING):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{', '.join(map(str, value))}`" if isinstance(value, tuple) else f"`{value}`"


if __name__ == "__main__":
    put_between(OF_COMMANDS, of_commands(), START, END, title="Every command")
    put_between(OF_RECIPES, of_recipes(), START, END, title="Every key of a recipe")
