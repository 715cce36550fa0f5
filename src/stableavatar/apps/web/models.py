"""The tab of models: which are on this machine, and getting the published ones."""

import html
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from stableavatar.apps.web.studio import Studio
from stableavatar.apps.web.texts import Texts
from stableavatar.errors import StableAvatarError

_TELL_SECONDS = 0.5


def models_tab(studio: Studio, texts: Texts, tab: gr.Tab) -> None:
    """Build it; to be called within its tab."""
    gr.Markdown(f"**{texts['model_in_use']}**: {studio.model}")
    here = gr.HTML("", label=texts["models_here"], elem_id="models")
    gr.Markdown(f"### {texts['get_weights']}\n{texts['get_help']}")
    with gr.Row():
        variant = gr.Radio(["square", "rec-vec"], value="square", label=texts["variant"], elem_id="variant")
        size = gr.Radio(["1.3b", "14b"], value="1.3b", label=texts["size"], elem_id="model-size")
        vocals = gr.Checkbox(False, label=texts["with_vocals"], elem_id="with-vocals")
    button = gr.Button(texts["get_weights"], elem_id="get-weights")
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

    def get(
        variant: Literal["square", "rec-vec"],
        size: Literal["1.3b", "14b"],
        vocals: bool,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (how Gradio hands it over)
    ) -> str:
        from stableavatar.checkpoints import hub

        there = 0, 0

        def heard(done: int, total: int) -> None:
            nonlocal there
            there = done, total

        def fetch() -> Path:
            return hub.download(studio.checkpoints, variant, size, vocal_separator=vocals, progress=heard)

        try:
            # Gradio wants to hear of it in this thread.
            with ThreadPoolExecutor(1) as pool:
                running = pool.submit(fetch)
                while wait([running], timeout=_TELL_SECONDS).not_done:
                    progress(*_told(texts, *there))
                folder = running.result()
        except StableAvatarError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return texts("download_done", folder=folder)

    quiet: dict[str, Any] = {"api_visibility": "private"}
    tab.select(show, None, here, **quiet)
    button.click(get, [variant, size, vocals], said, concurrency_limit=1, **quiet).then(
        show, None, here, **quiet
    )


def _told(texts: Texts, done: int, total: int) -> tuple[float, str]:
    """A share, and a line above it; see `gradio.Progress`."""
    if not total:
        return 0.0, texts["download_asks"]
    if done == total:
        return 1.0, texts["download_checks"]
    return done / total, texts("download_comes", done=f"{done / 1e9:.2f}", total=f"{total / 1e9:.2f}")
