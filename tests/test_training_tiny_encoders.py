"""The encoders of speech and prompts that `tiny` learns before its transformer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import UMT5EncoderModel, Wav2Vec2Model

from stableavatar.data.puppets import EXPRESSIONS, Identity
from stableavatar.data.puppets.clip import draw_prompt
from stableavatar.training.tiny import speech_encoder, text_encoder
from stableavatar.training.tiny.avatar import TEXT_LENGTH
from stableavatar.training.tiny.prompts import free_prompt
from stableavatar.training.tiny.speech_encoder import (
    SpeechEncoderSettings,
    SpeechWindows,
    build_speech_encoder,
    tracks_at_features,
)


def test_speech_encoder_gives_fifty_features_a_second() -> None:
    encoder = build_speech_encoder().eval()
    assert sum(value.numel() for value in encoder.parameters()) < 1_500_000
    with torch.no_grad():
        features = encoder(torch.randn(1, 32_000)).last_hidden_state
    assert features.shape == (1, 99, 192)


def test_targets_are_aligned_to_features() -> None:
    ramp = np.repeat((np.arange(100, dtype=np.float32) + 0.5)[:, None] / 25, 6, axis=1)
    read = tracks_at_features(ramp, 50, start=1.0)
    # A ramp that says the time in seconds must say the middle of each feature.
    assert read[:, 0] == pytest.approx(1.0 + np.arange(50) * 0.02 + 0.0125, abs=1e-4)


def test_speech_encoder_learns_and_is_written(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    times = np.arange(48_000) / 16_000
    recordings = []
    for _ in range(4):
        loudness = np.clip(np.sin(2 * np.pi * rng.uniform(1, 3) * times + rng.uniform(0, 6)), 0, 1)
        tone = sum(np.sin(2 * np.pi * rng.uniform(90, 200) * k * times) / k for k in range(1, 20))
        recordings.append((0.1 * loudness * tone).astype(np.float32))
    settings = SpeechEncoderSettings(
        minutes=0.12, batch=4, longest=1.4, hidden_size=48, convolution_channels=16, threads=1
    )
    model = speech_encoder.train(settings, SpeechWindows(recordings), tmp_path)
    assert speech_encoder.correlations(model, recordings)["opening"] > 0.5
    figures = {"opening": 0.5}
    monkeypatch.setattr(speech_encoder, "correlations", lambda model, recordings: figures)
    monkeypatch.setattr(speech_encoder, "unseen_speech", lambda seed, seconds, person: recordings[0])
    speech_encoder.main(
        [
            "--out",
            str(tmp_path / "out"),
            "--puppets",
            str(store),
            "--minutes",
            "0.001",
            "--batch",
            "1",
            "--hidden-size",
            "48",
        ]
    )
    assert Wav2Vec2Model.from_pretrained(tmp_path / "out" / "final").config.hidden_size == 48
    assert json.loads((tmp_path / "out" / "figures.json").read_text()) == figures


def test_prompts_ask_for_every_expression_in_many_places() -> None:
    drawn = [text_encoder.prompt_of(seed) for seed in range(300)]
    assert {expression for _, expression in drawn} == set(range(len(EXPRESSIONS)))
    for prompt, expression in drawn:
        named = {word for word in EXPRESSIONS if word in prompt.lower()}
        assert named <= {EXPRESSIONS[expression]}, prompt
        puppets = draw_prompt(expression, Identity.from_seed(7), EXPRESSIONS[expression])
        assert (EXPRESSIONS[expression] in puppets) == (EXPRESSIONS[expression] != "neutral")
    shares = [EXPRESSIONS[expression] in prompt.lower() for prompt, expression in drawn]
    assert 0.5 < np.mean(shares) < 0.9
    assert np.mean([len(prompt) < TEXT_LENGTH for prompt, _ in drawn]) > 0.98
    assert any(prompt.lower().startswith("smiling") for prompt, _ in drawn)
    assert any(prompt.endswith("smiling") for prompt, _ in drawn)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_prompts_as_people_write_them(expression: str) -> None:
    rng = np.random.default_rng(5)
    drawn = [free_prompt(rng, expression) for _ in range(200)]
    assert len(set(drawn)) > 100 or expression in {"nodding"}
    for prompt in drawn:
        assert not set("{}") & set(prompt)
        assert "HIS" not in prompt
        assert not re.search(r"\b[Aa] [aeiou]", prompt)
        assert prompt[0].isupper()
        assert not re.search(r"\. [a-z]", prompt)
    assert sum(expression in prompt.lower() for prompt in drawn) < 180, "it is said in other words too"
    with pytest.raises(ValueError, match="is none of"):
        free_prompt(rng, "whistling")


def test_an_encoder_stays_like_another_in_what_it_says_of_puppets(tmp_path: Path) -> None:
    """And learns what it did not know."""
    text_encoder.main(["--out", str(tmp_path / "first"), "--steps", "2", "--threads", "1"])
    like = str(tmp_path / "first" / "final")
    strayed = {}
    for weight in ("0", "30"):
        out = tmp_path / weight
        text_encoder.main(
            ["--out", str(out), "--like", like, "--steps", "30", "--head-steps", "5", "--warmup-steps", "2",
             "--batch", "16", "--like-weight", weight, "--threads", "1"]
        )  # fmt: skip
        strayed[weight] = json.loads((out / "figures.json").read_text())["strayed"]
    assert strayed["30"] < 0.3 * strayed["0"]


def test_the_prompt_encoder_learns_and_is_written(tmp_path: Path) -> None:
    arguments = [
        "--out",
        str(tmp_path),
        "--steps",
        "60",
        "--batch",
        "24",
        "--warmup-steps",
        "5",
        "--threads",
        "1",
    ]
    text_encoder.main(arguments)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["accuracy"] > 0.4  # by chance 1 of 7
    curve = [json.loads(line)["loss"] for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert curve[-1] < 0.8 * curve[0]
    UMT5EncoderModel.from_pretrained(tmp_path / "final")
    with pytest.raises(ValueError, match="at least 1"):
        text_encoder.TextEncoderSettings(steps=0)
    with pytest.raises(SystemExit):
        text_encoder.main(["--out", str(tmp_path), "--like-weight", "3"])
