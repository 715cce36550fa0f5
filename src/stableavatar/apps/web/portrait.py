"""The field of a portrait: Gradio's field of a picture, which hands the file over as it was sent."""

from abc import ABCMeta
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData


def _as_sent(_field: gr.Image, payload: ImageData | None) -> str | None:
    """The picture's file: Gradio would recompress it, and make its transparent parts black."""
    return None if payload is None else payload.path


# A class, since Gradio copies fields for each page that is open; and made this way, since a statement `class`
# has Gradio write a stub beside this file, where nobody may be able to write. On the page it is an `image`.
Portrait: Any = ABCMeta.__new__(
    type(gr.Image),
    "Portrait",
    (gr.Image,),
    {"__module__": __name__, "__doc__": __doc__, "is_template": True, "preprocess": _as_sent},
)
