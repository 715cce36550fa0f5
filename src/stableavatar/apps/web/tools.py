"""The tabs that prepare recordings: the sound of a video, and the voice without the music."""

from pathlib import Path
from typing import Any

import gradio as gr

from stableavatar.apps.web.sentences import in_words
from stableavatar.apps.web.studio import Studio
from stableavatar.apps.web.texts import Texts
from stableavatar.errors import StableAvatarError


def audio_tab(studio: Studio, texts: Texts) -> None:
    """Extract audio; to be called within its tab."""
    from stableavatar.data.extract import extract_audio

    gr.Markdown(texts["extract_help"])

    def extract(file: str | None) -> str:
        with _Told(studio, texts, file) as output:
            extract_audio(Path(file or ""), output, most_seconds=studio.limits.seconds)
        return str(output)

    _tool(texts, "extract", extract)


def vocals_tab(studio: Studio, texts: Texts) -> None:
    """Separate vocals; to be called within its tab."""
    gr.Markdown(texts["separate_help"])

    def separate(file: str | None) -> str:
        if not studio.vocals.is_file():
            raise gr.Error(texts["no_network"], print_exception=False)
        from stableavatar.data.vocals import VocalSeparator, separate_vocals

        with _Told(studio, texts, file) as output:
            separator = VocalSeparator(studio.vocals)
            separate_vocals(separator, Path(file or ""), output, most_seconds=studio.limits.seconds)
        return str(output)

    _tool(texts, "separate", separate)


def _tool(texts: Texts, name: str, work: Any) -> None:
    """A file, a button, and what it gives."""
    with gr.Row():
        with gr.Column():
            given = gr.File(label=texts["recording_or_video"], type="filepath", elem_id=f"{name}-file")
            button = gr.Button(texts[name], variant="primary", elem_id=f"{name}-button")
        result = gr.Audio(label=texts["result"], type="filepath", interactive=False, elem_id=f"{name}-result")
    # One at a time: videos are made meanwhile.
    button.click(work, given, result, api_visibility="private", concurrency_limit=1)


class _Told:
    """A WAV to write, and errors as sentences on the page."""

    def __init__(self, studio: Studio, texts: Texts, file: str | None) -> None:
        if not file:
            raise gr.Error(texts["no_file"], print_exception=False)
        self._language = texts.language
        self.output = studio.scratch.folder() / f"{Path(file).stem}.wav"

    def __enter__(self) -> Path:
        return self.output

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, StableAvatarError):
            raise gr.Error(in_words(str(error), self._language), print_exception=False) from error
