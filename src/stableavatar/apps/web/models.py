"""The tab of models: which are on this machine, and getting the published ones."""

import html
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from stableavatar.apps.web.studio import Studio
from stableavatar.apps.web.texts import Texts
from stableavatar.errors import StableAvatarError


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
    said = gr.Markdown("", elem_id="download-said")

    def show() -> str:
        from stableavatar.apps.installation import survey

        return "".join(
            f"<h4>{html.escape(section.title)}</h4><table class='settings'>"
            + "".join(
                f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
                for name, text in section.rows
            )
            + "</table>"
            for section in survey(studio.checkpoints)
        )

    def get(
        variant: Literal["square", "rec-vec"],
        size: Literal["1.3b", "14b"],
        vocals: bool,
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008  (how Gradio hands it over)
    ) -> str:
        from stableavatar.checkpoints import hub

        try:
            folder: Path = hub.download(studio.checkpoints, variant, size, vocal_separator=vocals)
        except StableAvatarError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return texts("download_done", folder=folder)

    quiet: dict[str, Any] = {"api_visibility": "private"}
    tab.select(show, None, here, **quiet)
    button.click(get, [variant, size, vocals], said, concurrency_limit=1, **quiet).then(
        show, None, here, **quiet
    )
