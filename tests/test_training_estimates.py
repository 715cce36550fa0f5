"""Estimates of memory and time: what they must be by the sizes alone."""

from pathlib import Path

import pytest

from stableavatar.errors import InputError
from stableavatar.training.estimates import END, START, Estimate, estimate, main
from stableavatar.training.recipes import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"


def found(name: str, *overrides: str, gpus: int = 1) -> Estimate:
    return estimate(load_recipe(RECIPES / f"{name}.yaml", overrides), gpus)


def test_states_are_a_multiple_of_what_is_trained() -> None:
    whole = found("1.3b-square")
    assert whole.gradients == 4 * whole.trained
    assert whole.optimizer == 8 * whole.trained
    assert whole.weights > 4 * whole.trained
    small = found("1.3b-square", "trainer.optimizer.kind=adamw-8bit", "trainer.ema_decay=0.9")
    assert small.optimizer == whole.optimizer / 4
    assert small.average == whole.gradients
    assert whole.average == 0


def test_a_lora_trains_little_and_saves_the_gradients_of_weights() -> None:
    whole, lora = found("1.3b-square"), found("1.3b-square-lora", "data.lists=[video_square_path.txt]")
    assert lora.trained < 0.1 * whole.trained
    assert lora.operations == pytest.approx(whole.operations * 3 / 4)


def test_operations_are_those_of_the_layers_and_of_attention() -> None:
    """By hand, of what grows with the picture: 81 frames of 512x512 are 21 x 32 x 32 tokens."""
    tokens, dim, hidden, layers = 21 * 32 * 32, 1536, 8960, 30
    itself = 4 * tokens * tokens * dim
    to_others = 4 * tokens * (512 + 257) * dim
    # Self-attention has four maps of the tokens, attention to what is outside another two, and the feed-
    # forward two.
    maps = 2 * tokens * (4 * dim * dim + 2 * dim * dim + 2 * dim * hidden)
    forward = found("1.3b-square").operations / 4
    assert forward == pytest.approx(layers * (itself + to_others + maps), rel=0.12)
    assert forward > layers * (itself + to_others + maps)


def test_recomputing_takes_time_for_memory() -> None:
    kept = found("1.3b-square", "trainer.gradient_checkpointing=false")
    recomputed = found("1.3b-square", "trainer.gradient_checkpointing=true")
    assert kept.operations == pytest.approx(recomputed.operations * 3 / 4)
    assert kept.activations > 5 * recomputed.activations


def test_spread_over_more_gpus_all_but_a_block_and_what_is_outside_shrinks() -> None:
    eight, many = (found("14b-rec-vec-square", "trainer.sharding=fsdp2", gpus=gpus) for gpus in (8, 64))
    assert many.optimizer == pytest.approx(eight.optimizer / 8)
    assert many.gradients == pytest.approx(eight.gradients / 8)
    assert eight.weights / 8 < many.weights < eight.weights
    assert many.activations == eight.activations
    assert eight.seconds(2) == 2 * eight.seconds(1)


def test_activations_are_those_of_the_layers_and_the_adapter() -> None:
    whole = found("1.3b-square", "trainer.gradient_checkpointing=false")
    recomputed = found("1.3b-square", "trainer.gradient_checkpointing=true")
    tokens, dim, layers = 21 * 32 * 32, 1536, 30
    between = 2 * tokens * dim * layers  # bfloat16 inputs of blocks
    # One block of the transformer at a time is there; an upper bound, since the adapter's count too.
    inside = (whole.activations - recomputed.activations + between) / (layers - 1)
    # At least queries, keys, values and results of two attentions over the video, and the feed-forward.
    assert inside > 2 * tokens * (8 * dim + 8960)
    assert recomputed.activations > between + 2 * tokens * (8 * dim + 8960)
    wide = found("14b-rec-vec-square")
    assert wide.activations > 3 * recomputed.activations


def test_the_document_is_what_the_command_writes_of_every_recipe_of_the_published_sizes(
    tmp_path: Path,
) -> None:
    document = tmp_path / "scaling.md"
    assert main(["--recipes", str(RECIPES), "--out", str(document)]) == 0
    shipped = (RECIPES.parent / "docs" / "scaling.md").read_text()
    written = document.read_text()
    assert written[written.index(START) : written.index(END)] in shipped
    rows = [line.split("|")[1].strip() for line in document.read_text().splitlines() if line.startswith("| ")]
    wanted = {path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("tiny")}
    assert set(rows) - {"recipe", "---"} == wanted
    with pytest.raises(InputError, match="published sizes"):
        found("tiny")
