"""The tab of models: which are on this machine, and getting the published ones."""

import asyncio
import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from stableavatar.apps.web.downloads import Downloads, Going
from stableavatar.apps.web.studio import Studio, guarded
from stableavatar.apps.web.texts import Texts
from stableavatar.checkpoints import hub

_TELL_SECONDS = 0.5


def models_tab(studio: Studio, texts: Texts, tab: gr.Tab, page: gr.Blocks) -> None:
    """Build it; to be called within its tab."""
    gr.Markdown(f"**{texts['model_in_use']}**: {studio.model}")
    if studio.downloads is None:
        gr.Markdown(texts["no_downloads"])
    else:
        _weights(studio.downloads, texts, tab, page)


def _weights(downloads: Downloads, texts: Texts, tab: gr.Tab, page: gr.Blocks) -> None:
    """What is on this machine, and getting more."""
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

    @guarded(texts)
    def show() -> str:
        from stableavatar.apps.installation import survey

        return "".join(
            f"<h4>{html.escape(section.title)}</h4><table class='settings'>"
            + "".join(
                f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
                for name, text in section.rows
            )
            + "</table>"
            for section in sorted(survey(downloads.folder), key=lambda it: it.title != "Models")
        )

    @guarded(texts)
    async def get(
        variant: Literal["square", "rec-vec"],
        size: Literal["1.3b", "14b"],
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (how Gradio hands it over)
    ) -> str:
        return await fetched(hub.download, (variant, size), progress)

    @guarded(texts)
    async def get_vocals(progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
        return await fetched(hub.download_vocal_separator, (), progress)

    async def fetched(download: Callable[..., Path], choice: Sequence[str], progress: gr.Progress) -> str:
        if not downloads.begin(download, choice):
            gr.Info(texts["download_going"])
        return await followed(progress)

    @guarded(texts)
    async def find(progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        """One that is going on, which another page, or this one before it was opened anew, has begun."""
        if downloads.going is None or downloads.going.ended:
            return gr.skip()
        return await followed(progress)

    async def followed(progress: gr.Progress) -> str:
        while (going := downloads.going) is not None and not going.ended:
            progress(*_told(texts, going))
            await asyncio.sleep(_TELL_SECONDS)
        assert going is not None
        if going.stopped:
            return texts["download_stopped"]
        if going.error is not None:
            raise gr.Error(going.error or texts["download_lost"], print_exception=False)
        return texts("download_done", folder=downloads.folder)

    quiet: dict[str, Any] = {"api_visibility": "private"}
    tab.select(show, None, here, **quiet)
    unlimited: dict[str, Any] = {"concurrency_limit": None}
    for begun in (
        button.click(get, [variant, size], said, **unlimited, **quiet),
        voices.click(get_vocals, None, said, **unlimited, **quiet),
        page.load(find, None, said, **unlimited, **quiet),
    ):
        begun.then(show, None, here, **quiet)
    stop.click(downloads.stop, None, None, queue=False, **quiet)


def _told(texts: Texts, going: Going) -> tuple[float, str]:
    """A share, and a line above it; see `gradio.Progress`."""
    done, total = going.done, going.total
    if not total:
        return 0.0, texts["download_asks"]
    if done == total:
        return 1.0, texts["download_checks"]
    return done / total, texts("download_comes", done=f"{done / 1e9:.2f}", total=f"{total / 1e9:.2f}")
