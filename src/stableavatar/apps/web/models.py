"""The tab of models: which are on this machine, and getting the published ones."""

import asyncio
import html
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import anyio.to_thread
import gradio as gr

from stableavatar.apps.web.downloads import Downloads, Going
from stableavatar.apps.web.sentences import in_words
from stableavatar.apps.web.studio import Studio, guarded
from stableavatar.apps.web.texts import Texts
from stableavatar.checkpoints import hub
from stableavatar.checkpoints.layout import find_published
from stableavatar.choices import Variant
from stableavatar.errors import CheckpointError

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
    variant = gr.Radio(
        [(texts[f"variant_{name}"], name) for name in get_args(Variant)],
        value="square",
        label=texts["variant"],
        elem_id="variant",
    )
    with gr.Row():
        button = gr.Button(texts["get_weights"], elem_id="get-weights")
        voices = gr.Button(texts["get_vocals"], elem_id="get-vocals")
        stop = gr.Button(texts["stop"], variant="stop", elem_id="stop-download")
    said = gr.Markdown("", elem_id="download-said", min_height=90)  # room for the bar

    @guarded(texts)
    def show() -> str:
        return _table(texts, downloads.folder)

    @guarded(texts)
    async def get(
        variant: Variant,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (how Gradio hands it over)
    ) -> str:
        return await fetched(hub.download, (variant,), progress)

    @guarded(texts)
    async def get_vocals(progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
        return await fetched(hub.download_vocal_separator, (), progress)

    async def fetched(download: Callable[..., Path], choice: Sequence[str], progress: gr.Progress) -> str:
        if not downloads.begin(download, choice):
            gr.Info(texts["download_going"])
        return await followed(progress)

    @guarded(texts)
    async def find(progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        """One that is going on, which another page, or this one before it was opened anew, has begun; and
        what there is at its end."""
        if downloads.going is None or downloads.going.ended:
            return gr.skip(), gr.skip()
        return await followed(progress), await anyio.to_thread.run_sync(show)

    async def followed(progress: gr.Progress) -> str:
        while (going := downloads.going) is not None and not going.ended:
            progress(*_told(texts, going))
            await asyncio.sleep(_TELL_SECONDS)
        assert going is not None
        if going.stopped:
            return texts["download_stopped"]
        if going.error is not None:
            words = in_words(going.error, texts.language) or texts["download_lost"]
            raise gr.Error(words, print_exception=False)
        if not downloads.choice:
            return texts["vocals_done"]
        folder = shlex.quote(str(downloads.folder.resolve()))
        return texts("download_done", options=f"--model {folder} --variant {downloads.choice[0]}")

    quiet: dict[str, Any] = {"api_visibility": "private"}
    tab.select(show, None, here, **quiet)
    unlimited: dict[str, Any] = {"concurrency_limit": None}
    for begun in (
        button.click(get, variant, said, **unlimited, **quiet),
        voices.click(get_vocals, None, said, **unlimited, **quiet),
    ):
        begun.success(show, None, here, **quiet)
        begun.failure(show, None, here, **quiet)
    page.load(find, None, [said, here], show_progress_on=said, **unlimited, **quiet)
    stop.click(downloads.stop, None, None, queue=False, **quiet)


def _table(texts: Texts, folder: Path) -> str:
    """What is on this machine of what the page can get, and of what is in the package."""
    rows = [("tiny", texts["comes_along"])]
    if (folder / "transformer").is_dir():  # a model of this project's own
        rows.append((str(folder), texts["model_ready"]))
    try:
        published = find_published(folder)
    except CheckpointError:  # there is nothing yet
        published = None
    for variant in get_args(Variant):
        here = published is not None and not published.missing(variant)
        name = f"{texts['model_published']}, {texts[f'variant_{variant}']}"
        rows.append((name, texts["model_ready" if here else "model_missing"]))
    voices = published is not None and published.vocal_separator is not None
    rows.append((texts["vocal_separator"], texts["model_ready" if voices else "model_missing"]))
    cells = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(state)}</td></tr>" for name, state in rows)
    return f"<table class='settings'>{''.join(cells)}</table>"


def _told(texts: Texts, going: Going) -> tuple[float, str]:
    """A share, and a line above it; see `gradio.Progress`."""
    done, total = going.done, going.total
    if not total:
        return 0.0, texts["download_asks"]
    if done == total:
        return 1.0, texts["download_checks"]
    return done / total, texts("download_comes", done=f"{done / 1e9:.2f}", total=f"{total / 1e9:.2f}")
