"""What a command has around it: errors in a line, Ctrl-C, several processes."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import typer

from stableavatar.errors import InputError, StableAvatarError, StoppedError, is_out_of_memory, is_out_of_room

if TYPE_CHECKING:
    from stableavatar.placement.processes import Processes

FAULT = 2
INTERRUPTED = 130
TERMINATED = 143


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors that a user can act on in a line or two, with an exit status; others pass with their traceback.

    2 for what was given (`StableAvatarError`) and for too little memory, 130 after Ctrl-C.
    """
    try:
        yield
    except StoppedError as error:
        if leads():
            typer.secho(str(error), err=True, fg="yellow")
        raise typer.Exit(INTERRUPTED) from None
    except StableAvatarError as error:
        _fail(str(error), FAULT)
    except KeyboardInterrupt:
        typer.secho("Interrupted.", err=True, fg="yellow")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if is_out_of_room(error):
            where = getattr(error, "filename", None) or "the disk"
            _fail(f"{where}: there is no room left. Make some, then give the command again", FAULT)
        if not is_out_of_memory(error):
            raise
        _fail(
            "there is too little memory for this. Have less of other things running, or smaller files", FAULT
        )


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Around a command that has options for it: what to do where there is too little memory.

    Raises:
        InputError: memory, of the machine or of a device, did not suffice.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, StableAvatarError) or not is_out_of_memory(error):
            raise
        raise InputError(f"there is too little memory for this. {advice}") from error


def one_of_several() -> bool:
    """Whether torchrun has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def leads() -> bool:
    """Whether this process is the first of several, or alone."""
    return not one_of_several() or os.environ.get("RANK", "0") == "0"


@contextmanager
def together(device: str) -> Iterator[tuple["Processes | None", str]]:
    """The processes that torchrun has started, if it has, and the device that is this one's."""
    if not one_of_several():
        yield None, device
        return
    from stableavatar.placement.processes import joined, local_device

    with joined(device) as processes:
        yield processes, local_device(device)


@contextmanager
def stop_between_cells() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed; it is heard between steps, pressed again it ends the program at once.

    Of several processes the first listens, and the others do as it does.
    """
    pressed = threading.Event()

    def press(_signal: int, _frame: FrameType | None) -> None:
        if not leads():
            return
        pressed.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        typer.echo("Stopping after this step; Ctrl-C again ends at once.", err=True)

    before = (
        signal.signal(signal.SIGINT, press) if threading.current_thread() is threading.main_thread() else None
    )
    try:
        yield pressed.is_set
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def run_to_the_end(command: Callable[[], None]) -> None:
    """Run a command that ends the process; one of several ends at once, since torch would wait for those that
    are lost."""
    if not one_of_several():
        command()
        return
    status = 1
    try:
        command()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def end_on_terminate() -> None:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that half-written files are removed."""

    def terminate(_signal: int, _frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    signal.signal(signal.SIGTERM, terminate)


def _fail(text: str, status: int) -> None:
    _say(text)
    raise typer.Exit(status) from None


def _say(text: str) -> None:
    who = "Error:" if leads() else f"Error (process {os.environ['RANK']}):"
    typer.echo(typer.style(who, fg="red", bold=True) + f" {text}", err=True)
