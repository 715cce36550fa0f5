"""Trains the prompt encoder of the embedded model to tell what a prompt asks for.

    python -m stableavatar.training.tiny.text_encoder --out FOLDER [--like ENCODER]

On prompts as puppets have them, on the same words in other orders, and on prompts as people write them
(`training.tiny.prompts`): a linear head on every byte's output names the expression. From scratch, or with
`--like` from an encoder that a transformer listens to already: what it says of puppets' prompts stays. Only
the encoder is kept, `FOLDER/final` in transformers' layout, and the transformer learns to listen to it
(spec/6-embedded-model.md). Where both learned together the prompt was left unheard
(docs/decisions/0009-prompts-of-tiny.md).
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ByT5Tokenizer, UMT5EncoderModel

from stableavatar.data.puppets import EXPRESSIONS, Identity
from stableavatar.data.puppets.clip import draw_prompt
from stableavatar.data.puppets.motion import draw_expression
from stableavatar.errors import InputError, with_status
from stableavatar.training.tiny.arguments import add_settings, chosen_settings
from stableavatar.training.tiny.avatar import TEXT_LENGTH, TEXT_WIDTH, build_text_encoder
from stableavatar.training.tiny.prompts import free_prompt

logger = logging.getLogger(__name__)

_UNSEEN = 10**6
"""Seeds from here on are for measuring."""
_NEUTRAL = EXPRESSIONS.index("neutral")
_LIKE_BATCH = 24


@dataclass(frozen=True)
class TextEncoderSettings:
    """Everything a run depends on."""

    steps: int = 2400
    head_steps: int = 100  # of the head alone, where the encoder is not from scratch
    like_weight: float = 1.0
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    batch: int = 48
    threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.threads) < 1:
            raise InputError("steps, batch and threads must be at least 1")
        if min(self.head_steps, self.like_weight) < 0:
            raise InputError("head_steps and like_weight must be at least 0")


def prompt_of(seed: int) -> tuple[str, int]:
    """A prompt, and which of `EXPRESSIONS` it asks for; a third of them as puppets have them, a sixth with
    the expression elsewhere, half as people write them; of the latter two some with other letters large."""
    rng = np.random.default_rng([seed, 707])
    expression = int(rng.integers(len(EXPRESSIONS)))
    word = EXPRESSIONS[expression]
    kind = rng.random()
    if kind < 1 / 3:
        return draw_prompt(seed, Identity.from_seed(seed), word), expression
    if kind > 1 / 2:
        return _styled(rng, free_prompt(rng, word)), expression
    identity = Identity.from_seed(seed)
    prompt, plain = draw_prompt(seed, identity, word), draw_prompt(seed, identity, "neutral")
    if expression != _NEUTRAL:
        article, rest = plain.split(" ", 1)
        plain = str(
            rng.choice(
                [
                    f"{word}, {plain}",
                    f"{article} {word} {rest}",
                    f"{plain} {word}",
                    f"{plain}. {word}",
                    word,
                    prompt,
                ]
            )
        )
    return _styled(rng, plain), expression


def _styled(rng: np.random.Generator, prompt: str) -> str:
    style = rng.random()
    if style < 0.3:
        prompt = prompt.lower()
    elif style < 0.4:
        prompt = prompt.upper()
    return prompt + ("." if rng.random() < 0.3 and not prompt.endswith(".") else "")


class ExpressionReader(nn.Module):
    """The encoder with the linear head that is dropped after training."""

    def __init__(self, encoder: UMT5EncoderModel | None = None) -> None:
        super().__init__()
        self.encoder = encoder or build_text_encoder()
        self.tokenizer = ByT5Tokenizer()
        self.head = nn.Linear(TEXT_WIDTH, len(EXPRESSIONS))

    def forward(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """What every byte says, [B, n, expressions], and which of them belong to the prompts, [B, n]."""
        hidden, there = self.encode(self.encoder, prompts)
        return self.head(hidden), there

    def encode(self, encoder: UMT5EncoderModel, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """An encoder's outputs [B, n, D], and which of them belong to the prompts, [B, n]."""
        tokens = self.tokenizer(
            list(prompts), padding="longest", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
        )
        hidden = encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return hidden, tokens.attention_mask.bool()


def train(settings: TextEncoderSettings, out: Path, like: UMT5EncoderModel | None = None) -> ExpressionReader:
    """Trains for the settings' steps with a rate that falls to zero; writes `out/curve.jsonl`.

    Args:
        like: to begin with, and to stay like in what it says of puppets' prompts.
    """
    if like is not None and settings.head_steps >= settings.steps:
        raise InputError(
            f"head_steps must be below the {settings.steps} steps, else the encoder learns nothing"
        )
    torch.manual_seed(settings.seed)
    model = ExpressionReader(copy.deepcopy(like)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98))
    recent: list[float] = []
    for step in range(settings.steps):
        left = 1 - step / settings.steps
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / settings.warmup_steps, 2 * left)
        first = (settings.seed * settings.steps + step) * settings.batch
        prompts, expressions = zip(
            *(prompt_of(seed % _UNSEEN) for seed in range(first, first + settings.batch)), strict=True
        )
        model.encoder.requires_grad_(like is None or step >= settings.head_steps)
        said, there = model(prompts)
        wanted = torch.tensor(expressions)[:, None].expand(there.shape)
        loss = F.cross_entropy(said[there], wanted[there])
        if like is not None:
            loss = loss + settings.like_weight * _strayed(model, like, first % _UNSEEN)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if (step + 1) % 20 == 0:
            with (out / "curve.jsonl").open("a", encoding="utf-8") as curve:
                curve.write(json.dumps({"step": step + 1, "loss": float(np.mean(recent))}) + "\n")
            if (step + 1) % 100 == 0:
                logger.info("step %d, loss %.4f", step + 1, np.mean(recent))
            recent.clear()
    return model.eval()


def _strayed(model: ExpressionReader, like: UMT5EncoderModel, first: int) -> torch.Tensor:
    """How far outputs for puppets' prompts lie from another encoder's, against how large they are."""
    prompts = [_puppet_prompt(seed) for seed in range(first, first + _LIKE_BATCH)]
    now, there = model.encode(model.encoder, prompts)
    with torch.no_grad():
        before, _ = model.encode(like, prompts)
    return (now - before)[there].square().mean() / before[there].square().mean()


def _puppet_prompt(seed: int) -> str:
    return draw_prompt(seed, Identity.from_seed(seed), draw_expression(seed))


@torch.no_grad()
def accuracy(model: ExpressionReader, count: int = 500) -> float:
    """The share of bytes of unseen prompts that name what their prompt asks for."""
    return _share_named(model, [prompt_of(seed) for seed in range(_UNSEEN, _UNSEEN + count)])


@torch.no_grad()
def free_accuracy(model: ExpressionReader, count: int = 500) -> float:
    """The same of prompts as people write them alone."""
    rng = np.random.default_rng(_UNSEEN)
    words = rng.integers(len(EXPRESSIONS), size=count)
    return _share_named(model, [(free_prompt(rng, EXPRESSIONS[word]), int(word)) for word in words])


def _share_named(model: ExpressionReader, prompts: Sequence[tuple[str, int]]) -> float:
    right = total = 0
    for prompt, expression in prompts:
        said, there = model([prompt])
        right += int((said[there].argmax(dim=-1) == expression).sum())
        total += int(there.sum())
    return right / total


@with_status
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description="Trains the prompt encoder of the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for curve, figures and model")
    parser.add_argument("--like", type=Path, help="an encoder's folder to begin with and to stay like")
    add_settings(parser, TextEncoderSettings)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    settings = chosen_settings(TextEncoderSettings, options)
    plain = TextEncoderSettings()
    if options.like is None and (settings.head_steps, settings.like_weight) != (
        plain.head_steps,
        plain.like_weight,
    ):
        parser.error("--head-steps and --like-weight do nothing without --like")
    torch.set_num_threads(settings.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    like = None if options.like is None else UMT5EncoderModel.from_pretrained(options.like).float().eval()
    model = train(settings, options.out, like)
    figures = {"accuracy": accuracy(model), "free_accuracy": free_accuracy(model)}
    if like is not None:
        with torch.no_grad():
            figures["strayed"] = float(_strayed(model, like, _UNSEEN))
    logger.info("of unseen prompts, %.1f %% of the bytes say what is asked for", 100 * figures["accuracy"])
    (options.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    model.encoder.save_pretrained(options.out / "final")
    return 0


if __name__ == "__main__":
    sys.exit(main())
