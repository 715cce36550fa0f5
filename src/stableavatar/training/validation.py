"""Videos of a training's model as it stands."""

import contextlib
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers import FlowMatchEulerDiscreteScheduler

from stableavatar.checkpoints.defaults import sampling_defaults
from stableavatar.checkpoints.layout import is_own, model_folder
from stableavatar.config import SHIFT
from stableavatar.data.encoding import Encoders
from stableavatar.errors import InputError
from stableavatar.options import generate_options
from stableavatar.pipeline import AvatarPipeline
from stableavatar.training.avatar import Avatar
from stableavatar.training.devices import process_device
from stableavatar.training.recipes import Recipe
from stableavatar.training.start import load_encoders
from stableavatar.training.tiny.assemble import embedded_pipeline
from stableavatar.training.tiny.avatar import TinyAvatar

logger = logging.getLogger(__name__)


class ValidationVideos:
    """Makes the recipe's validation videos, with sound, by the sampler that `generate` uses.

    They go to `validation/step-N/` in the output folder.

    Args:
        sizes: width and height in pixels of the clips that are trained with.

    Attributes:
        leads: whether this process writes; the others only take part, where the model is spread over them.
    """

    def __init__(
        self,
        recipe: Recipe,
        avatar: Avatar,
        encoders: Encoders | None,
        sizes: Iterable[tuple[int, int]],
    ) -> None:
        self.recipe, self.avatar, self.encoders = recipe, avatar, encoders
        self.sizes = tuple(sizes)
        self.leads = True

    def check(self) -> None:
        """Before a training that would come upon it hours later. Raises InputError: a portrait or a recording
        is not there, or `generate` has no such option or value."""
        assert self.recipe.validation is not None
        for case in self.recipe.validation.cases:
            for file in (case.portrait, case.speech):
                if not file.is_file():
                    raise InputError(f"validation: there is no file {file}")
        options = self.recipe.validation.options
        for name, place in (("prompt", "prompt"), ("duration", "seconds")):
            if name in options:
                raise InputError(f"validation: {name} belongs to a case, as its {place}, not to the options")
        generate_options(options)

    def __call__(self, step: int) -> None:
        assert self.recipe.validation is not None
        folder = self.recipe.output / "validation" / f"step-{step:08d}"
        device = process_device()
        encoders = self.encoders or load_encoders(self.recipe.model, device)
        pipeline = self._pipeline(encoders)
        precision = self.recipe.trainer.precision
        with contextlib.ExitStack() as stack:
            # Without its cache, which would keep a second copy of all trained weights to the end.
            stack.enter_context(
                torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
            )
            stack.enter_context(_placed(encoders, device))
            if not self.leads:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder.mkdir(parents=True, exist_ok=True)
            for number, case in enumerate(self.recipe.validation.cases):
                options = {"seed": 0, **self.recipe.validation.options}
                pipeline.generate(
                    case.portrait,
                    case.speech,
                    folder / f"{number:02d}-{case.portrait.stem}.mp4",
                    resume=False,
                    prompt=case.prompt,
                    duration=case.seconds,
                    **options,
                )
        logger.info("validation videos of step %d: %s", step, folder)

    def _pipeline(self, encoders: Encoders) -> AvatarPipeline:
        """The model as it stands, with the settings for sampling that belong to it."""
        model = self.recipe.model
        if isinstance(self.avatar, TinyAvatar):
            return embedded_pipeline(self.avatar, encoders.vae, encoders.speech_encoder)
        source = model_folder(model.source)
        if is_own(source):
            scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(source, subfolder="scheduler")
            defaults = AvatarPipeline.load_config(source).get("sampling_defaults")
        else:
            scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)  # as `convert` writes it
            defaults = sampling_defaults(model.variant, model.size)
            if model.variant is None:
                defaults["sizes"] = _by_aspect(self.sizes)
        return AvatarPipeline(
            transformer=self.avatar.transformer,
            vae=encoders.vae,
            text_encoder=encoders.text_encoder,
            tokenizer=encoders.tokenizer,
            image_encoder=encoders.image_encoder,
            speech_encoder=encoders.speech_encoder,
            scheduler=scheduler,
            sampling_defaults=defaults,
        )


def _by_aspect(sizes: Iterable[tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The commonest size of each aspect, which a model that is trained with them knows."""
    found: dict[str, tuple[int, int]] = {}
    for (width, height), _ in Counter(sizes).most_common():
        found.setdefault(
            "square" if width == height else "tall" if width < height else "wide", (width, height)
        )
    return found


@contextlib.contextmanager
def _placed(encoders: Encoders, device: torch.device) -> Iterator[None]:
    """The encoders where a pipeline needs them: on the device, or, if they are offloaded, one at a time."""
    parts = list(encoders.parts.values())
    if not encoders.offload:
        for part in parts:
            part.to(device)
        yield
        return
    before = None
    for part in parts:
        _, before = cpu_offload_with_hook(part, device, before)
    try:
        yield
    finally:
        for part in parts:
            remove_hook_from_module(part)
            part.to("cpu")
