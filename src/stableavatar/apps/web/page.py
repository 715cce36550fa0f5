"""The page: its tabs, its look, and the videos that it shows."""

import contextlib
from collections.abc import AsyncIterator, Collection
from pathlib import Path

import anyio
import anyio.to_thread
import gradio as gr
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import RedirectResponse, Response

from stableavatar.apps.running import THREADS
from stableavatar.apps.watching import ManyWatchError, Viewers, video_response
from stableavatar.apps.web.gallery import gallery_tab
from stableavatar.apps.web.guard import Guard
from stableavatar.apps.web.language import InOneLanguage
from stableavatar.apps.web.models import models_tab
from stableavatar.apps.web.studio import NamedBrowsers, Studio, owner_of
from stableavatar.apps.web.talk import talk_tab
from stableavatar.apps.web.texts import LANGUAGES, Language, Texts, preferred
from stableavatar.apps.web.tools import audio_tab, vocals_tab
from stableavatar.jobs.job import Job

_HOUR = 3600
_MOST_WAITING = 1000  # events of all open pages
_MOST_GOING = 200  # of them at a time: each page watches its video by one
_STYLE = Path(__file__).with_name("style.css")


def create_page(studio: Studio, hosts: Collection[str] | None = ()) -> FastAPI:
    """The application: a page in each language, and the addresses of videos.

    Args:
        hosts: see `origins.is_of_this_site`.
    """

    @contextlib.asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        yield

    app = FastAPI(openapi_url=None, lifespan=life)
    viewers = Viewers()

    def job_of(request: Request, job_id: str) -> Job:
        who = owner_of(dict(request.cookies))
        job = None if who is None else studio.store.get(who, job_id)
        if job is None:
            raise HTTPException(404)
        return job

    @app.get("/")
    def choose_language(request: Request) -> Response:
        return RedirectResponse(f"/{preferred(request.headers.get('accept-language', ''))}/")

    @app.get("/live/{job_id}.mp4")
    def live(request: Request, job_id: str) -> Response:
        job = job_of(request, job_id)
        if job.state == "failed" or (job.is_finished and job.video is None):
            raise HTTPException(404)
        try:
            return viewers.live_response(studio.store, job, Response(status_code=404))
        except ManyWatchError as error:
            raise HTTPException(429, str(error)) from error

    @app.get("/video/{job_id}.mp4")
    def video(request: Request, job_id: str) -> Response:
        job = job_of(request, job_id)
        if not job.is_finished or job.video is None:
            raise HTTPException(404)
        return video_response(job, job.video, Response(status_code=404))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    for language in LANGUAGES:
        gr.mount_gradio_app(
            app,
            _build(studio, language),
            f"/{language}",
            theme=_theme(),
            css_paths=[_STYLE],
            footer_links=[],
            run_history=False,  # it would act with the token of who runs this
            show_error=False,  # of what `guarded` has not put into words
            max_file_size=studio.limits.upload_bytes,
            ssr_mode=False,
        )
    app.add_middleware(InOneLanguage)
    app.add_middleware(NamedBrowsers)
    app.add_middleware(Guard, store=studio.store, hosts=hosts, most=studio.limits.upload_bytes)
    return app


def _build(studio: Studio, language: Language) -> gr.Blocks:
    texts = Texts(language)
    other = LANGUAGES[1 - LANGUAGES.index(language)]
    # Uploads are copies; jobs have their own.
    with gr.Blocks(
        title=texts["title"], analytics_enabled=False, fill_width=True, delete_cache=(_HOUR, 6 * _HOUR)
    ) as page:
        gr.HTML(
            f'<header class="top"><div><h1>{texts["title"]}</h1><p>{texts["subtitle"]}</p></div>'
            f'<a id="language" href="/{other}/" lang="{other}">{texts["other_language"]}</a></header>',
            padding=False,
        )
        with gr.Tabs(selected="talk") as tabs:
            with gr.Tab(texts["tab_talk"], id="talk", elem_id="tab-talk") as front:
                talk = talk_tab(studio, texts, front, page)
            with gr.Tab(texts["tab_gallery"], id="gallery") as gallery:
                gallery_tab(studio, texts, gallery, tabs, talk)
            with gr.Tab(texts["tab_audio"], id="audio"):
                audio_tab(studio, texts, page)
            with gr.Tab(texts["tab_vocals"], id="vocals") as vocals:
                vocals_tab(studio, texts, vocals, page)
            with gr.Tab(texts["tab_models"], id="models") as models:
                models_tab(studio, texts, models, page)
        gr.HTML(f'<p class="consent">{texts["consent"]}</p>', padding=False)
    page.max_threads = _MOST_GOING
    page.queue(default_concurrency_limit=8, max_size=_MOST_WAITING, api_open=False)
    page.has_launched = True  # else Gradio takes any file of this machine that a request names
    return page


def _theme() -> gr.themes.Base:
    return gr.themes.Soft(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        font=["system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
