"""The tab of what was made: each video with its settings, to be used again."""

import functools
import html
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from stableavatar.apps.watching import small, thumbnail
from stableavatar.apps.web.filling import as_made
from stableavatar.apps.web.studio import (
    Studio,
    download_link,
    empty_player,
    folder_for_page,
    guarded,
    owner,
    player,
)
from stableavatar.apps.web.texts import TEXTS, Texts
from stableavatar.errors import InputError
from stableavatar.jobs.job import Job
from stableavatar.media.image import read_picture

_PAGE = 60


def gallery_tab(studio: Studio, texts: Texts, tab: gr.Tab, tabs: gr.Tabs, fields: list[Any]) -> None:
    """Build it; to be called within its tab."""
    refresh = gr.Button(texts["refresh"], size="sm", elem_id="refresh")
    hint = gr.Markdown(texts["gallery_empty"], elem_id="gallery-empty")
    pictures = gr.Gallery(
        columns=5,
        height="auto",
        allow_preview=False,
        show_label=False,
        elem_id="gallery",
        buttons=[],
        object_fit="cover",
    )
    older = gr.Button(texts["older"], size="sm", visible=False, elem_id="older")
    chosen = gr.State(None)
    ids = gr.State([])
    most = gr.State(_PAGE)
    with gr.Row(visible=False) as about:
        with gr.Column(min_width=260):
            screen = gr.HTML("", elem_id="gallery-screen", padding=False)
        with gr.Column(min_width=260):
            settings = gr.HTML("", elem_id="gallery-settings")
            with gr.Row():
                again = gr.Button(texts["use_again"], variant="primary", elem_id="use-again")
                stop = gr.Button(texts["stop"], visible=False, elem_id="gallery-stop")
                delete = gr.Button(texts["delete"], elem_id="delete")
                really = gr.Button(
                    texts["delete_really"], variant="stop", visible=False, elem_id="delete-really"
                )
                keep = gr.Button(texts["keep"], visible=False, elem_id="keep")

    @guarded(texts)
    def show(request: gr.Request, most: int = _PAGE) -> Any:
        found = list(islice(_shown(studio, owner(request)), most + 1))
        pairs = [(job, picture) for job in found[:most] if (picture := _picture(job)) is not None]
        return (
            [(picture, _caption(job, texts)) for job, picture in pairs],
            [job.id for job, _ in pairs],
            gr.update(visible=not pairs),
            gr.update(visible=False),
            gr.update(visible=len(found) > most),
            most,
        )

    @guarded(texts)
    def show_older(request: gr.Request, most: int) -> Any:
        return show(request, most + _PAGE)

    @guarded(texts)
    def choose(request: gr.Request, known: list[str], event: gr.SelectData) -> Any:
        job = studio.store.get(owner(request), known[event.index])
        if job is None:
            return gr.skip(), "", "", gr.update(visible=False), gr.update(visible=False)
        going = not job.is_finished and not job.stopping
        about = gr.update(visible=True)
        return job.id, _screen(job, texts), _settings(job, texts), about, gr.update(visible=going)

    @guarded(texts)
    def use(request: gr.Request, job_id: str | None) -> Any:
        job = None if job_id is None else studio.store.get(owner(request), job_id)
        if job is None:
            return (gr.skip(),) * (2 + len(fields))
        gr.Info(texts["used_again"])
        nothing = ""  # the video would go on talking where it is not seen
        return gr.Tabs(selected="talk"), nothing, *as_made(job, folder_for_page())

    @guarded(texts)
    def end(request: gr.Request, job_id: str | None) -> Any:
        if job_id is not None:
            studio.store.cancel(owner(request), job_id)
        return gr.update(visible=False)

    @guarded(texts)
    def remove(request: gr.Request, job_id: str | None) -> None:
        if job_id is not None:
            studio.store.delete(owner(request), job_id)

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    listing = [pictures, ids, hint, about, older, most]
    tab.select(show, None, listing, **quiet)
    refresh.click(show, None, listing, **quiet)
    older.click(show_older, most, listing, **quiet)
    pictures.select(choose, ids, [chosen, screen, settings, about, stop], **quiet)
    stop.click(end, chosen, stop, **quiet)  # what there is of it is kept
    again.click(use, chosen, [tabs, screen, *fields], **quiet)
    asking = [delete, really, keep]
    delete.click(lambda: _visible(False, True, True), None, asking, queue=False, **quiet)
    really.click(remove, chosen, None, **quiet).then(show, None, listing, **quiet)
    for done in (really, keep):
        done.click(lambda: _visible(True, False, False), None, asking, queue=False, **quiet)
    pictures.select(lambda: _visible(True, False, False), None, asking, queue=False, **quiet)


def _visible(*those: bool) -> list[Any]:
    return [gr.update(visible=it) for it in those]


def _shown(studio: Studio, whose: str) -> Iterator[Job]:
    """Those with a video, and those in the making, which can be stopped here; newest first."""
    after: str | None = None
    while jobs := studio.store.list(whose, limit=_PAGE, after=after):
        yield from (job for job in jobs if job.video or not job.is_finished)
        after = jobs[-1].id


def _picture(job: Job) -> Image.Image | None:
    """The video's first frame, or the portrait while there is none; None where it was deleted meanwhile."""
    try:
        return _first_frame(job.video) if job.is_finished and job.video else _portrait(job.portrait)
    except (InputError, OSError):
        return None


@functools.lru_cache(maxsize=500)
def _first_frame(video: Path) -> Image.Image:
    """A finished video does not change."""
    return thumbnail(video)


@functools.lru_cache(maxsize=100)
def _portrait(picture: Path) -> Image.Image:
    return small(read_picture(picture))


def _screen(job: Job, texts: Texts) -> str:
    """Its player, and its file where it is complete; of one that waits, neither (see `talk`)."""
    if job.state == "queued":
        return empty_player(texts)
    return player(job, texts) + download_link(job, texts)


def _caption(job: Job, texts: Texts) -> str:
    asked = time.strftime("%m-%d %H:%M", time.localtime(job.created))
    seconds = f"{asked} · {texts('seconds', count=format(job.details['seconds'], '.0f'))}"
    return seconds if job.is_finished else f"{seconds} · {texts['in_the_making']}"


def _settings(job: Job, texts: Texts) -> str:
    """A table of everything that repeats the video, by the names that the form has."""
    options = {**job.options, **(job.result or {})}
    rows = "".join(
        f"<tr><th>{html.escape(_named(name, texts))}</th>"
        f"<td>{html.escape(_valued(name, value, texts))}</td></tr>"
        for name, value in options.items()
        if not (value is None or value is False or value in ("", []))
    )
    return f'<table class="settings">{rows}</table>'


# Where the form asks in other words than a table has.
_OTHERS = {"order": "order_chosen"}
_CHOICES = {"order": "order_chosen", "aspect": "shape"}


def _named(name: str, texts: Texts) -> str:
    name = _OTHERS.get(name, name)
    return texts[name] if name in TEXTS else name.replace("_", " ")


def _valued(name: str, value: object, texts: Texts) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    choice = f"{_CHOICES.get(name, name)}_{value}"
    return texts[choice] if choice in TEXTS else str(value)
