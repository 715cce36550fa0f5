"""The video transformer as it is trained: a batch of encoded samples in, the loss of a step out."""

import torch
from torch import nn

from stableavatar.data.encoding import EncodedBatch
from stableavatar.errors import InputError
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.training.objective import (
    ModelInputs,
    ObjectiveSettings,
    StepDraws,
    StepLoss,
    draw_step,
    step_loss,
    training_sigmas,
)


class Avatar(nn.Module):
    """The transformer and its objective; calling it gives the loss of a step."""

    def __init__(self, transformer: StableAvatarTransformer3DModel, objective: ObjectiveSettings) -> None:
        super().__init__()
        self.transformer = transformer
        self.objective = objective
        self.sigmas = training_sigmas(objective.shift)

    @staticmethod
    def never_acts(_name: str) -> bool:
        """Whether a parameter has no part in any result."""
        return False

    def inputs(self, batch: EncodedBatch) -> ModelInputs:
        """What the transformer takes. Of a window in the middle of a clip the first latent frame is not
        judged; see `judged_frames`.

        Raises:
            InputError: the batch has no embeddings of prompts and portraits.
        """
        prompt, empty, portrait = batch.prompt_embeddings, batch.empty_prompt, batch.portrait_embeddings
        if prompt is None or empty is None or portrait is None:
            raise InputError(
                "this model is trained on embeddings of prompts and portraits, which the cache does not "
                "hold: make it again with stableavatar cache-latents"
            )
        return ModelInputs(
            latents=batch.latents,
            condition=batch.condition,
            prompt=prompt,
            empty_prompt=empty,
            portrait=portrait,
            speech=batch.speech,
            face_mask=batch.face_mask,
            lip_mask=batch.lip_mask,
            judged=None if all(batch.starts_clip) else judged_frames(batch),
        )

    def forward(self, batch: EncodedBatch, generator: torch.Generator) -> StepLoss:
        """Loss of one step, everything random drawn from `generator`."""
        return self.loss(batch, draw_step(batch.latents.shape, self.objective, self.sigmas, generator))

    def loss(self, batch: EncodedBatch, draws: StepDraws) -> StepLoss:
        """Loss of one step with given draws."""
        return step_loss(self.transformer, self.inputs(batch), draws, self.objective)


def judged_frames(batch: EncodedBatch) -> torch.Tensor:
    """Which latent frames' errors count, 0 or 1, `[B, F]`: all but the first of windows that do not start
    with their clip. When sampling, what a window says of it is blended away, save in the first window, whose
    first latent frame is of another kind.
    """
    judged = batch.latents.new_ones(batch.latents.shape[0], batch.latents.shape[2])
    judged[:, 0] = judged.new_tensor(batch.starts_clip)
    return judged
