"""Prompts into embeddings (spec 1)."""

import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

logger = logging.getLogger(__name__)

_SHOWN = 80  # characters of what is not read


@torch.no_grad()
def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: UMT5EncoderModel,
    prompts: Sequence[str],
    text_length: int,
    device: torch.device | None = None,
    *,
    quiet: Collection[str] = (),
) -> torch.Tensor:
    """Prompt embeddings `[len(prompts), text_length, text_dim]`, zeros after the tokens of each prompt.

    A prompt of more than `text_length` tokens is cut there, as in training; a warning names what is not read,
    but of those in `quiet`. `device` is where the encoder computes, by default where its weights lie.
    """
    tokens: Any = tokenizer(
        list(prompts),
        padding="longest",
        truncation=True,
        max_length=text_length,
        return_attention_mask=True,
        return_tensors="pt",
    )
    if tokens.input_ids.shape[1] == text_length:
        for prompt, read in zip(prompts, tokens.input_ids.tolist(), strict=True):
            if prompt not in quiet:
                _warn_of_rest(tokenizer, prompt, read)
    device = device or text_encoder.device
    if not tokens.input_ids.shape[1]:  # of empty prompts, by a tokenizer that marks no end
        return torch.zeros(len(prompts), text_length, text_encoder.config.d_model, device=device)
    return encode_tokens(
        text_encoder, tokens.input_ids.to(device), tokens.attention_mask.to(device), text_length
    )


def _warn_of_rest(tokenizer: PreTrainedTokenizerBase, prompt: str, read: Sequence[int]) -> None:
    """Say what of a prompt lies after the token ids that are read, if anything does."""
    whole = tokenizer(prompt, verbose=False).input_ids
    if len(whole) <= len(read):
        return
    same = next(
        (n for n, (one, other) in enumerate(zip(whole, read, strict=False)) if one != other), len(read)
    )
    rest = str(tokenizer.decode(whole[same:], skip_special_tokens=True)).strip()
    logger.warning(
        "a prompt of %d tokens is longer than the %d that the model reads; not read: %s",
        len(whole),
        len(read),
        rest if len(rest) <= _SHOWN else f"{rest[:_SHOWN]}...",
    )


def encode_tokens(
    text_encoder: UMT5EncoderModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, text_length: int
) -> torch.Tensor:
    """Embeddings `[B, text_length, text_dim]` of token ids `[B, n]`, zeros where the mask `[B, n]` is 0."""
    hidden = text_encoder(input_ids, attention_mask=attention_mask).last_hidden_state
    hidden = hidden * attention_mask[..., None].to(hidden)
    return torch.nn.functional.pad(hidden, (0, 0, 0, text_length - hidden.shape[1]))
