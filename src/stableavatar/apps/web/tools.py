"""The tabs that prepare recordings: the sound of a video, and the voice without the music."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradio as gr

from stableavatar.apps.web.sentences import in_words
from stableavatar.apps.web.studio import Studio, guarded, sent
from stableavatar.apps.web.texts import Texts
from stableavatar.errors import StableAvatarError, StoppedError
from stableavatar.jobs.apart import BrokenFileError, run_apart

_SEPARATING = 4.0  # seconds that separating a second of the longest recording may take


def audio_tab(studio: Studio, texts: Texts, page: gr.Blocks) -> None:
    """Extract audio; to be called within its tab."""
    gr.Markdown(texts["extract_help"])

    def extract(file: str | None, stop: Callable[[], bool]) -> str:
        with _told(studio, texts, file) as (source, output):
            seconds = studio.limits.check_seconds
            run_apart(_extract, source, output, studio.limits.seconds, seconds=seconds, stop=stop)
        return str(output)

    _tool(texts, "extract", extract, page)


def vocals_tab(studio: Studio, texts: Texts, tab: gr.Tab, page: gr.Blocks) -> None:
    """Separate vocals; to be called within its tab."""
    gr.Markdown(texts["separate_help"])
    lacks = gr.Markdown("", visible=False, elem_id="separate-lacks")

    def separate(file: str | None, stop: Callable[[], bool]) -> str:
        if missing := _missing(studio, texts):
            raise gr.Error(missing, print_exception=False)
        with _told(studio, texts, file) as (source, output):
            most = studio.limits.seconds
            run_apart(_separate, studio.vocals, source, output, most, seconds=_SEPARATING * most, stop=stop)
        return str(output)

    button = _tool(texts, "separate", separate, page)

    def look() -> tuple[Any, Any]:
        missing = _missing(studio, texts)
        return gr.update(value=missing, visible=bool(missing)), gr.update(interactive=not missing)

    tab.select(look, None, [lacks, button], queue=False, api_visibility="private", show_progress="hidden")


def _missing(studio: Studio, texts: Texts) -> str:
    """What separating needs and is not there, as a sentence; empty where nothing is missing."""
    if find_spec("onnxruntime") is None:
        return texts["no_onnxruntime"]
    if not studio.vocals.is_file():
        return texts["no_network" if studio.downloads is not None else "no_network_here"]
    return ""


def _extract(source: Path, output: Path, most_seconds: float) -> None:
    from stableavatar.data.extract import extract_audio

    extract_audio(source, output, most_seconds=most_seconds)


def _separate(network: Path, source: Path, output: Path, most_seconds: float) -> None:
    from stableavatar.data.vocals import VocalSeparator, separate_vocals

    separate_vocals(VocalSeparator(network), source, output, most_seconds=most_seconds)


def _tool(
    texts: Texts, name: str, work: Callable[[str | None, Callable[[], bool]], str], page: gr.Blocks
) -> gr.Button:
    """A file, a button, and what it gives; another button gives it up, and so does closing the page."""
    with gr.Row():
        with gr.Column():
            given = gr.File(label=texts["recording_or_video"], type="filepath", elem_id=f"{name}-file")
            with gr.Row():
                button = gr.Button(texts[name], variant="primary", elem_id=f"{name}-button", scale=3)
                stop = gr.Button(texts["stop"], variant="stop", elem_id=f"{name}-stop", scale=1)
        result = gr.Audio(
            label=texts["result"],
            type="filepath",
            interactive=False,
            elem_id=f"{name}-result",
            buttons=["download"],
        )
    going: dict[str | None, threading.Event] = {}  # of each open page, to give it up

    def wait(request: gr.Request) -> None:
        """It may have to wait for its turn, and may be given up until then."""
        going[request.session_hash] = threading.Event()

    @guarded(texts)
    def begin(request: gr.Request, file: str | None) -> str:
        given_up = going.get(request.session_hash)
        try:
            if given_up is None or given_up.is_set():
                raise gr.Error(texts["stopped"], print_exception=False)
            return work(file, given_up.is_set)
        finally:
            if going.get(request.session_hash) is given_up:
                going.pop(request.session_hash, None)

    def give_up(request: gr.Request) -> None:
        if (given_up := going.get(request.session_hash)) is not None:
            given_up.set()

    def leave(request: gr.Request) -> None:
        if (given_up := going.pop(request.session_hash, None)) is not None:
            given_up.set()

    at_once: dict[str, Any] = {"queue": False, "api_visibility": "private"}
    # One of a kind at a time in each language: videos are made meanwhile.
    button.click(wait, None, None, **at_once).then(
        begin, given, result, api_visibility="private", concurrency_limit=1
    )
    stop.click(give_up, None, None, **at_once)
    page.unload(leave)
    return button


@contextmanager
def _told(studio: Studio, texts: Texts, file: str | None) -> Iterator[tuple[Path, Path]]:
    """What was sent, and a WAV to write; errors are sentences on the page."""
    if not file:
        raise gr.Error(texts["no_file"], print_exception=False)
    source = sent(file, texts)
    with studio.scratch.held() as folder:
        try:
            yield source, folder / f"{source.stem}.wav"
        except StoppedError as error:
            raise gr.Error(texts["stopped"], print_exception=False) from error
        except BrokenFileError as error:
            raise gr.Error(texts["broken_file"], print_exception=False) from error
        except StableAvatarError as error:
            # Where it lies here is nothing to whoever sent it.
            words = str(error).replace(str(source), source.name).replace(str(folder), "")
            raise gr.Error(in_words(words, texts.language), print_exception=False) from error
