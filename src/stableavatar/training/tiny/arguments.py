"""Settings of the trainings of `tiny`'s parts as options of their commands."""

import argparse
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def add_settings(parser: argparse.ArgumentParser, kind: type[Any]) -> None:
    """An option for every number of a dataclass of settings."""
    for field in fields(kind):
        if isinstance(field.default, int | float):
            name = f"--{field.name.replace('_', '-')}"
            parser.add_argument(name, type=type(field.default), default=field.default)


def chosen_settings(kind: Callable[..., Settings], options: argparse.Namespace) -> Settings:
    """The settings that were given. Raises ValueError for what cannot be."""
    known = inspect.signature(kind).parameters
    return kind(**{name: value for name, value in vars(options).items() if name in known})
