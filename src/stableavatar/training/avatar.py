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
        """What the transformer takes.

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
        )

    def forward(self, batch: EncodedBatch, generator: torch.Generator) -> StepLoss:
        """Loss of one step, everything random drawn from `generator`."""
        return self.loss(batch, draw_step(batch.latents.shape, self.objective, self.sigmas, generator))

    def loss(self, batch: EncodedBatch, draws: StepDraws) -> StepLoss:
        """Loss of one step with given draws."""
        return step_loss(self.transformer, self.inputs(batch), draws, self.objective)
