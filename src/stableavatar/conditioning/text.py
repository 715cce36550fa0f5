"""Prompts into embeddings (spec 1)."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel


@torch.no_grad()
def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: UMT5EncoderModel,
    prompts: Sequence[str],
    text_length: int,
) -> torch.Tensor:
    """Prompt embeddings `[len(prompts), text_length, text_dim]`, zeros after the tokens of each prompt.

    A prompt of more than `text_length` tokens is cut there, as in training.
    """
    tokens: Any = tokenizer(
        list(prompts),
        padding="longest",
        truncation=True,
        max_length=text_length,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return encode_tokens(text_encoder, tokens.input_ids, tokens.attention_mask, text_length)


def encode_tokens(
    text_encoder: UMT5EncoderModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, text_length: int
) -> torch.Tensor:
    """Embeddings `[B, text_length, text_dim]` of token ids `[B, n]`, zeros where the mask `[B, n]` is 0."""
    mask = attention_mask.to(text_encoder.device)
    hidden = text_encoder(input_ids.to(text_encoder.device), attention_mask=mask).last_hidden_state
    hidden = hidden * mask[..., None].to(hidden.dtype)
    return torch.nn.functional.pad(hidden, (0, 0, 0, text_length - hidden.shape[1]))
