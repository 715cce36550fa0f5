"""The tab in which a portrait is made to talk."""

import asyncio
import math
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, get_args

import anyio.to_thread
import gradio as gr

from stableavatar.apps.web.filling import FIELDS, as_asked
from stableavatar.apps.web.portrait import Portrait
from stableavatar.apps.web.sentences import in_words
from stableavatar.apps.web.studio import (
    Studio,
    empty_player,
    folder_for_page,
    guarded,
    line,
    owner,
    player,
    sent,
    status,
)
from stableavatar.apps.web.texts import Texts
from stableavatar.choices import Fit, GuidanceRule, OverlapWeights, SpeechNormalisation
from stableavatar.errors import InputError, is_out_of_room
from stableavatar.jobs.asking import ask, copied
from stableavatar.jobs.intake import BusyError, EndingError, check_options
from stableavatar.jobs.job import PORTRAIT, Job
from stableavatar.jobs.quotas import NoRoomError, QueueFullError
from stableavatar.options import AUDIO_NATIVE_WEIGHTS, SIZE_MULTIPLE, GenerateOptions

_LOOK_SECONDS = 0.25
_TOLD_SECONDS = 3600.0

# On a phone it lies below the form.
_TO_THE_SCREEN = (
    "() => document.querySelector('#screen').scrollIntoView({behavior: 'smooth', block: 'nearest'})"
)
_EXAMPLE_FOLDER = Path(__file__).parents[2] / "assets" / "demo"
_EXAMPLE = ("portrait.png", "speech.flac")
_WHOLE = ("steps", "overlap", "seed", "width", "height")


def talk_tab(studio: Studio, texts: Texts, tab: gr.Tab, page: gr.Blocks) -> list[Any]:
    """Build it, to be called within its tab; the fields of its form, which `gallery` fills in again."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=300):
            form = _form(studio, texts)
            with gr.Row():
                make = gr.Button(texts["make"], variant="primary", elem_id="make", scale=3)
                stop = gr.Button(texts["stop"], variant="stop", elem_id="stop", interactive=False, scale=1)
            with gr.Accordion(texts["advanced"], open=False, elem_id="advanced"):
                form |= _advanced(studio, texts, form["portrait"])
        with gr.Column(scale=5, min_width=300):
            screen = gr.HTML(empty_player(texts), elem_id="screen", padding=False)
            state = gr.HTML("", elem_id="status", padding=False)
            if studio.model == "tiny":
                gr.Markdown(texts["small_model"], elem_id="small-model")
    job = gr.State(None)
    shown = [screen, state, make, stop]

    # What each open page looks at. A page that asks for another video looks at that one from then on.
    looks: dict[str | None, object] = {}

    def hear(request: gr.Request) -> Any:
        """The files are looked at first, which may take its time; the button is not pressed twice."""
        looks.pop(request.session_hash, None)
        return line("in_progress", texts["looking"]), gr.update(interactive=False)

    @guarded(texts)
    def take_back(request: gr.Request, job_id: str | None) -> Any:
        """Nothing was begun: the page shows again what it showed."""
        try:
            found = None if job_id is None else studio.store.get(owner(request), job_id)
        except sqlite3.Error:  # for which nothing was begun, too; the button has to work again
            return gr.skip(), "", gr.update(interactive=True), gr.skip()
        return (gr.skip(), *_nothing_asked(texts)[1:]) if found is None else _views(studio, texts, found)

    @guarded(texts)
    def look_again(request: gr.Request, job_id: str | None) -> Any:
        """What was shown may have been deleted in the gallery."""
        if job_id is None or studio.store.get(owner(request), job_id) is not None:
            return gr.skip(), *_nothing()
        return None, *_nothing_asked(texts)

    @guarded(texts)
    async def begin(request: gr.Request, *values: Any) -> Any:
        made = await anyio.to_thread.run_sync(
            lambda: _ask(studio, texts, owner(request), dict(zip(FIELDS, values, strict=True)))
        )
        return made.id, empty_player(texts), *_views(studio, texts, made)[1:]

    async def look_at(request: gr.Request, job_id: str | None, *, found: bool) -> AsyncIterator[Any]:
        page_id, look = request.session_hash, object()
        looks[page_id] = look
        try:
            async for views in _watch(studio, texts, owner(request), job_id, found=found):
                if looks.get(page_id) is not look:
                    yield _nothing()  # Gradio shows what came last once more
                    return
                yield views
        finally:
            if looks.get(page_id) is look:
                del looks[page_id]

    @guarded(texts)
    async def watch(request: gr.Request, job_id: str | None) -> AsyncIterator[Any]:
        async for views in look_at(request, job_id, found=False):
            yield views

    @guarded(texts)
    async def watch_found(request: gr.Request, job_id: str | None) -> AsyncIterator[Any]:
        async for views in look_at(request, job_id, found=True):
            yield views

    @guarded(texts)
    async def find(request: gr.Request) -> Any:
        """What this browser has in the making, or what was made or has failed within the hour, and the form
        that it was asked for with: the page may have been opened anew, in the other language too."""
        found = await anyio.to_thread.run_sync(lambda: _latest(studio, owner(request)))
        if found is None:
            return None, *_nothing(), *(gr.skip(),) * len(FIELDS)
        views = list(_views(studio, texts, found))
        if found.is_finished and found.video is not None:
            views[0] = player(found, texts, plays=False)
        try:
            values = await anyio.to_thread.run_sync(lambda: as_asked(found, folder_for_page()))
        except OSError:  # it was deleted meanwhile, or the disk is full
            values = [gr.skip()] * len(FIELDS)
        return found.id, *views, *values

    @guarded(texts)
    def end(request: gr.Request, job_id: str | None) -> None:
        if job_id is not None:
            studio.store.cancel(owner(request), job_id)

    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    unlimited: dict[str, Any] = {**hidden, "concurrency_limit": None}
    watching: dict[str, Any] = {**unlimited, "trigger_mode": "multiple"}
    fields = [form[name] for name in FIELDS]
    make.click(None, None, None, js=_TO_THE_SCREEN)
    heard = make.click(hear, None, [state, make], queue=False, **hidden)
    begun = heard.then(begin, fields, [job, *shown], **unlimited)
    begun.success(watch, job, shown, **watching)
    taken_back = begun.failure(take_back, job, shown, queue=False, **hidden)
    taken_back.then(watch_found, job, shown, **watching)
    opened = page.load(find, None, [job, *shown, *fields], **unlimited)
    opened.success(watch_found, job, shown, **watching)
    stop.click(end, job, None, **unlimited)
    tab.select(look_again, job, [job, *shown], queue=False, **hidden)
    return fields


def _latest(studio: Studio, who: str) -> Job | None:
    """What somebody has in the making, or what ended within the hour and was not stopped."""
    jobs = studio.store.list(who, limit=20)
    for job in jobs:
        if not job.is_finished:
            return job
    newest = jobs[0] if jobs and jobs[0].state != "cancelled" else None
    return newest if newest and time.time() - (newest.finished or 0) < _TOLD_SECONDS else None


def _form(studio: Studio, texts: Texts) -> dict[str, Any]:
    defaults = studio.defaults
    form: dict[str, Any] = {}
    with gr.Row(equal_height=True):
        form["portrait"] = Portrait(
            label=texts["portrait"],
            type="filepath",
            sources=["upload", "webcam", "clipboard"],
            height=296,  # as the recording beside it needs
            elem_id="portrait",
            min_width=200,
            buttons=["download", "fullscreen"],
        )
        form["speech"] = gr.Audio(
            label=texts["speech"],
            type="filepath",
            sources=["upload", "microphone"],
            elem_id="speech",
            min_width=200,
            buttons=["download"],
        )
    example = gr.Button(texts["example"], size="sm", elem_id="example")
    form["prompt"] = gr.Textbox(
        label=texts["prompt"],
        info=texts["prompt_help"],
        placeholder=texts["prompt_example"],
        lines=2,
        max_length=studio.limits.prompt,
        elem_id="prompt",
    )
    shapes = ["auto", *defaults.sizes]
    form["aspect"] = gr.Radio(
        [(texts[f"shape_{name}"], name) for name in shapes],
        value="auto",
        label=texts["shape"],
        elem_id="shape",
        visible=len(shapes) > 2,
    )
    # Of windows in wavefront order: the first is done when its neighbour is a step behind it, and so on.
    before_first = math.ceil(defaults.steps / 2)
    form["first_frames"] = gr.Checkbox(
        True,
        label=texts["order"],
        info=texts("order_help", windows=before_first),
        elem_id="first-frames",
    )

    @guarded(texts)
    def fill_in() -> tuple[str, str, str]:
        folder = folder_for_page()
        for file in _EXAMPLE:
            copied(_EXAMPLE_FOLDER / file)(folder / file)
        portrait, speech = (str(folder / file) for file in _EXAMPLE)
        return portrait, speech, texts["example_prompt"]

    filled = [form[name] for name in ("portrait", "speech", "prompt")]
    example.click(fill_in, None, filled, api_visibility="private", show_progress="hidden")
    return form


def _advanced(studio: Studio, texts: Texts, portrait: gr.Image) -> dict[str, Any]:
    defaults, limits = studio.defaults, studio.limits
    form: dict[str, Any] = {}
    most_overlap = (defaults.window - 1) // 4

    def slider(name: str, least: float, most: float, step: float, value: float) -> None:
        form[name] = gr.Slider(
            least,
            most,
            value=value,
            step=step,
            label=texts[name],
            info=texts(f"{name}_help", default=f"{value:g}"),
            elem_id=name.replace("_", "-"),
        )

    slider("steps", 1, limits.steps, 1, defaults.steps)
    slider("text_scale", 0, 10, 0.5, defaults.text_scale)
    slider("audio_scale", 0, 10, 0.5, defaults.audio_scale)

    def radio(name: str, choices: tuple[str, ...]) -> None:
        form[name] = gr.Radio(
            [(texts[f"{name}_{choice}"], choice) for choice in choices],
            value=choices[0],
            label=texts[name],
            info=texts[f"{name}_help"],
            elem_id=name.replace("_", "-"),
        )

    radio("guidance", get_args(GuidanceRule))
    usual = {"text_scale": defaults.text_scale, "audio_scale": defaults.audio_scale}

    def that_suit(rule: str) -> dict[str, float]:
        return AUDIO_NATIVE_WEIGHTS if rule == "audio-native" else usual

    def strengths(rule: str) -> list[Any]:
        return [gr.update(value=value) for value in that_suit(rule).values()]

    def advice(rule: str) -> list[Any]:
        suit = that_suit(rule).items()
        return [gr.update(info=texts(f"{name}_help", default=f"{value:g}")) for name, value in suit]

    of_both = [form[name] for name in usual]
    at_once: dict[str, Any] = {"queue": False, "api_visibility": "private"}
    # By hand: a video whose settings are used again has its own.
    form["guidance"].input(strengths, form["guidance"], of_both, **at_once)
    form["guidance"].change(advice, form["guidance"], of_both, **at_once)
    form["negative_prompt"] = gr.Textbox(
        "",
        label=texts["negative_prompt"],
        info=texts["negative_prompt_help"],
        max_length=limits.prompt,
        elem_id="negative-prompt",
    )
    slider("overlap", 2, most_overlap, 1, defaults.overlap)
    radio("overlap_weights", get_args(OverlapWeights))
    slider("step_cache", 0, 0.3, 0.01, 0.0)
    radio("speech_normalisation", get_args(SpeechNormalisation))
    slider("quality", 0, 40, 1, 18)

    # Texts: Gradio's number fields turn "nothing" into 0 when the fold is opened.
    def number(name: str, info: str | None) -> None:
        form[name] = gr.Textbox(
            "", label=texts[name], info=info, placeholder="–", elem_id=name, min_width=100
        )

    number("seed", texts["seed_help"])
    with gr.Row(equal_height=True):
        number("width", texts["size_help"])
        number("height", texts["size_help"])
    with gr.Row():
        of_picture = gr.Button(texts["size_of_picture"], size="sm", elem_id="size-of-picture")
        swap = gr.Button(texts["swap"], size="sm", elem_id="swap")
    radio("fit", get_args(Fit))
    with gr.Row():
        form["fps"] = gr.Number(
            25,
            label=texts["fps"],
            info=texts["fps_help"],
            elem_id="fps",
            min_width=100,
        )
        form["start"] = gr.Number(
            0, label=texts["start"], info=texts["start_help"], elem_id="start", min_width=100
        )
        number("duration", texts["duration_help"])
    size = [form["width"], form["height"]]
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

    @guarded(texts)
    def of(request: gr.Request, chosen: str | None) -> tuple[int, int]:
        """A size of the picture's own shape, with as many pixels as the trained one that is nearest."""
        if chosen is None:
            raise gr.Error(texts["no_portrait"], print_exception=False)
        try:
            picture = studio.scratch.folder() / PORTRAIT  # under this name errors do not say where it lies
            copied(sent(chosen, texts))(picture)
            found = studio.checker.check(owner(request), picture, None, GenerateOptions(duration=1.0))
        except (InputError, BusyError, EndingError) as error:
            raise gr.Error(in_words(str(error), texts.language), print_exception=False) from error
        shape = found.width / found.height
        near = defaults.size_for("auto", found.width, found.height)
        area = near[0] * near[1]
        width = max(round((area * shape) ** 0.5 / SIZE_MULTIPLE), 1) * SIZE_MULTIPLE
        return width, max(area // width // SIZE_MULTIPLE, 1) * SIZE_MULTIPLE  # not above the area

    of_picture.click(of, portrait, size, **quiet)  # queued: of what is not, Gradio shows no errors
    swap.click(lambda width, height: (height, width), size, size, queue=False, **quiet)
    return form


def _ask(studio: Studio, texts: Texts, who: str, values: dict[str, Any]) -> Job:
    """The job that a form asks for. Raises gradio.Error: it cannot be."""
    portrait, speech = values.pop("portrait"), values.pop("speech")
    if portrait is None:
        raise gr.Error(texts["no_portrait"], print_exception=False)
    if speech is None and not str(values["duration"] or "").strip():
        raise gr.Error(texts["no_speech"], print_exception=False)
    quality = int(values.pop("quality"))
    order = "causal" if values.pop("first_frames") else "wavefront"
    chosen = {name: value for name, value in values.items() if value is not None and str(value).strip()}
    chosen |= {name: _number(texts, name, chosen[name]) for name in (*_WHOLE, "duration") if name in chosen}
    if "width" in chosen:
        chosen["aspect"] = "auto"
    try:
        options = check_options({**chosen, "order": order}, studio.limits)
        return ask(
            studio.store,
            studio.checker,
            who,
            copied(sent(portrait, texts)),
            copied(sent(speech, texts)) if speech else None,
            options,
            quality,
        )
    except (InputError, QueueFullError, BusyError, EndingError) as error:
        raise gr.Error(in_words(str(error), texts.language), print_exception=False) from error
    except (NoRoomError, OSError) as error:
        if not isinstance(error, NoRoomError) and not is_out_of_room(error):
            raise
        raise gr.Error(texts["no_room"], print_exception=False) from error


def _number(texts: Texts, name: str, value: Any) -> int | float:
    """What was typed. Raises gradio.Error: it is no number."""
    try:
        return int(value) if name in _WHOLE else float(value)
    except ValueError:
        raise gr.Error(texts("no_number", name=texts[name], value=value), print_exception=False) from None


async def _watch(
    studio: Studio, texts: Texts, who: str, job_id: str | None, *, found: bool
) -> AsyncIterator[Any]:
    """What is shown of a job as it changes, to its end. One that waits has no player: browsers keep few
    connections to a host, and two tabs would take all of them. One that was `found` when it had ended is on
    the screen."""
    said, plays = None, False
    if job_id is None:
        yield _nothing()  # without a word, Gradio would empty what is shown
    while job_id is not None:
        job = await anyio.to_thread.run_sync(studio.store.get, who, job_id)
        if job is None:  # deleted in the gallery
            yield _nothing_asked(texts)
            return
        plays, found = plays or (found and job.is_finished), False
        anew = not plays and job.state != "queued"
        views = await anyio.to_thread.run_sync(_views, studio, texts, job, anew)
        if anew or views[1] != said:
            said, plays = views[1], plays or anew
            yield views
        if job.is_finished:
            return
        await asyncio.sleep(_LOOK_SECONDS)


def _nothing() -> tuple[Any, ...]:
    """What is shown stays as it is."""
    return (gr.skip(),) * 4


def _nothing_asked(texts: Texts) -> tuple[Any, ...]:
    """A page on which no video was asked for."""
    make = gr.update(interactive=True, value=texts["make"])
    return empty_player(texts), "", make, gr.update(interactive=False)


def _views(studio: Studio, texts: Texts, job: Job, anew: bool = False) -> tuple[Any, ...]:
    """The screen, the status, and the buttons; the screen changes only with the job, or the video would begin
    anew."""
    screen = gr.skip()
    if job.state == "failed" or (job.is_finished and job.video is None):
        screen = empty_player(texts)
    elif anew:
        screen = player(job, texts)
    return (
        screen,
        status(job, studio.store, texts),
        gr.update(interactive=True, value=texts["make" if job.is_finished else "make_another"]),
        gr.update(interactive=not job.is_finished and not job.stopping),
    )
