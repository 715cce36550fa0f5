"""The tab of models: which are on this machine, and getting the published ones."""

import asyncio
import html
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from stableavatar.apps.web.studio import Studio
from stableavatar.apps.web.texts import Texts
from stableavatar.checkpoints import hub
from stableavatar.errors import StableAvatarError
from stableavatar.lifetimes import end_with_parent

_TELL_SECONDS = 0.5


def models_tab(studio: Studio, texts: Texts, tab: gr.Tab) -> None:
    """Build it; to be called within its tab."""
    gr.Markdown(f"**{texts['model_in_use']}**: {studio.model}")
    here = gr.HTML("", label=texts["models_here"], elem_id="models")
    gr.Markdown(f"### {texts['get_weights']}\n{texts['get_help']}")
    with gr.Row():
        variant = gr.Radio(["square", "rec-vec"], value="square", label=texts["variant"], elem_id="variant")
        size = gr.Radio(["1.3b", "14b"], value="1.3b", label=texts["size"], elem_id="model-size")
    with gr.Row():
        button = gr.Button(texts["get_weights"], elem_id="get-weights")
        voices = gr.Button(texts["get_vocals"], elem_id="get-vocals")
        stop = gr.Button(texts["stop"], variant="stop", elem_id="stop-download")
    said = gr.Markdown("", elem_id="download-said", min_height=90)  # room for the bar

    def show() -> str:
        from stableavatar.apps.installation import survey

        return "".join(
            f"<h4>{html.escape(section.title)}</h4><table class='settings'>"
            + "".join(
                f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
                for name, text in section.rows
            )
            + "</table>"
            for section in sorted(survey(studio.checkpoints), key=lambda it: it.title != "Models")
        )

    async def get(
        variant: Literal["square", "rec-vec"],
        size: Literal["1.3b", "14b"],
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (how Gradio hands it over)
    ) -> str:
        return await fetched(hub.download, (variant, size), progress)

    async def get_vocals(progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
        return await fetched(hub.download_vocal_separator, (), progress)

    async def fetched(download: Callable[..., Path], choice: Sequence[str], progress: gr.Progress) -> str:
        # A process of its own, since the library's threads cannot be ended: the page can.
        here, there = get_context("spawn").Pipe(duplex=False)
        process = get_context("spawn").Process(
            target=_download, args=(there, download, studio.checkpoints, choice), daemon=True
        )
        process.start()
        there.close()
        told: Any = (0, 0)
        try:
            while isinstance(told, tuple):
                progress(*_told(texts, *told))
                await asyncio.sleep(_TELL_SECONDS)
                while isinstance(told, tuple) and here.poll():
                    told = here.recv()
        except EOFError:
            told = texts["download_lost"]
        finally:
            process.kill()
        if told is not None:
            raise gr.Error(told, print_exception=False)
        return texts("download_done", folder=studio.checkpoints)

    quiet: dict[str, Any] = {"api_visibility": "private"}
    tab.select(show, None, here, **quiet)
    alone: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "download"}
    begun = (
        button.click(get, [variant, size], said, **alone, **quiet),
        voices.click(get_vocals, None, said, **alone, **quiet),
    )
    for one in begun:
        one.then(show, None, here, **quiet)
    stop.click(lambda: texts["download_stopped"], None, said, cancels=list(begun), queue=False, **quiet)


def _download(page: Connection, download: Callable[..., Path], folder: Path, choice: Sequence[str]) -> None:
    """Tells the page how many bytes of how many are there, at last None, or what went wrong."""
    end_with_parent()
    try:
        download(folder, *choice, progress=lambda *there: page.send(there))
    except StableAvatarError as error:
        page.send(str(error))
    else:
        page.send(None)


def _told(texts: Texts, done: int, total: int) -> tuple[float, str]:
    """A share, and a line above it; see `gradio.Progress`."""
    if not total:
        return 0.0, texts["download_asks"]
    if done == total:
        return 1.0, texts["download_checks"]
    return done / total, texts("download_comes", done=f"{done / 1e9:.2f}", total=f"{total / 1e9:.2f}")
