"""Puppets: people rendered from a seed who talk, with sound and with every label a real clip hides.

    from stableavatar.data.puppets import make_clip
    clip = make_clip(7, seconds=4.0)

See `python -m stableavatar.data.puppets --help` for contact sheets and stores. Spec section 6.
"""

from stableavatar.data.puppets.articulation import Articulation, articulate
from stableavatar.data.puppets.clip import PuppetClip, iter_clips, make_clip
from stableavatar.data.puppets.identity import EVALUATION_SEED, Identity
from stableavatar.data.puppets.layout import write_clip, write_dataset
from stableavatar.data.puppets.motion import EXPRESSIONS, Motion, draw_expression, make_motion
from stableavatar.data.puppets.render import Renderer, render_frames
from stableavatar.data.puppets.store import ClipStore, StoredClip, build_store

__all__ = [
    "EVALUATION_SEED",
    "EXPRESSIONS",
    "Articulation",
    "ClipStore",
    "Identity",
    "Motion",
    "PuppetClip",
    "Renderer",
    "StoredClip",
    "articulate",
    "build_store",
    "draw_expression",
    "iter_clips",
    "make_clip",
    "make_motion",
    "render_frames",
    "write_clip",
    "write_dataset",
]
