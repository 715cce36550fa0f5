"""A LoRA of one person for the embedded model, by its recipe, and the measure of what it gains."""

from pathlib import Path

import numpy as np
import pytest
import torch

from stableavatar.data.puppets import Identity, make_clip
from stableavatar.errors import InputError
from stableavatar.evaluation import lora
from stableavatar.training.recipes import load_recipe
from stableavatar.training.run import cache_latents, prepare_training

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny-lora.yaml"


def test_clips_are_of_one_person_who_says_different_things() -> None:
    trained = list(lora.training_clips(2, 1.0))
    measured = list(lora.measured_clips(2, 1.0))
    clips = [*trained, *measured]
    assert {clip.identity.seed for clip in clips} == {lora.PERSON}
    assert all(np.array_equal(clip.portrait, clips[0].portrait) for clip in clips)
    for index, clip in enumerate(clips):
        assert not any(np.array_equal(clip.samples, other.samples) for other in clips[:index])
    assert Identity.from_seed(lora.PERSON) != make_clip(lora.FIRST_SEED, 0.1).identity


def test_from_the_clips_to_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lora.main(["data", "--folder", str(tmp_path / "data"), "--clips", "2", "--seconds", "0.6"]) == 0
    listing = capsys.readouterr().out.strip()
    recipe = load_recipe(
        RECIPE,
        [
            f"output={tmp_path}", f"data.lists=[{listing}]", f"data.cache={tmp_path / 'latents'}",
            "data.clips.frames=13", "data.window_frames=9", "trainer.steps=2",
            "trainer.batch_size=1", "trainer.accumulation=1", "lora.rank=2", "lora.alpha=64",
            "trainer.optimizer.learning_rate=0.1",
        ],
    )  # fmt: skip
    assert cache_latents(recipe, tmp_path / "latents", passes=1, dtype=torch.bfloat16) == 2
    result, made = prepare_training(recipe).run()
    assert (result.step, result.skipped_steps) == (2, 0)
    arguments = ["--lora", str(made), "--clips", "1", "--seconds", "0.6", "--scales", "1", "--steps", "1"]
    document = tmp_path / "training.md"
    # Two steps at such a rate teach nothing.
    assert lora.main(["measure", *arguments, "--out", str(document)]) == 1
    rows = {
        line.split("|")[1].strip(): line.split("|")[2:5]
        for line in document.read_text().splitlines()
        if line.startswith("| ")
    }
    assert rows["without"] == rows["scale 0"] != rows["scale 1"]
    assert lora.main(["measure", "--lora", str(tmp_path / "none"), "--clips", "1", "--seconds", "0.4"]) == 2


class Pipeline:
    """Whose frames tell at what scale its LoRA acts."""

    def __init__(self) -> None:
        self.scale = 0.0

    def load_lora_weights(self, *_: object, **__: object) -> None: ...

    def set_adapters(self, _name: str, scale: float) -> None:
        self.scale = scale


def test_frames_that_differ_at_scale_0_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By what a scale of 0 must be held against: a model that is another each time."""
    clips = list(lora.measured_clips(1, 0.2))
    made = iter(range(10))

    def different(*_: object) -> lora.LoraFigures:
        half = np.full(1, 0.5)
        return lora.LoraFigures(half, half, half, (np.full((1, 2, 2, 3), next(made), np.uint8),))

    monkeypatch.setattr(lora, "measure", different)
    monkeypatch.setattr(lora, "load", lambda _: Pipeline())
    with pytest.raises(InputError, match="at scale 0"):
        lora.compare("tiny", tmp_path, clips, [1.0])


@pytest.mark.parametrize(
    ("similarity", "sharpness", "gained"),
    [
        ([0.1, 0.1, 0.1, 0.1, 0.1, -0.3], 0.1, True),
        ([0.1, 0.1, 0.1, 0.1, -0.1, -0.1], 0.1, False),  # a median alone would have it
        ([0.1] * 6, -0.1, False),
    ],
)
def test_what_counts_as_a_gain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, similarity: list[float], sharpness: float, gained: bool
) -> None:
    def measured(pipeline: Pipeline, *_: object) -> lora.LoraFigures:
        still = (np.zeros((1, 2, 2, 3), np.uint8),)
        return lora.LoraFigures(
            0.5 + pipeline.scale * np.array(similarity),
            np.full(6, 0.5 + pipeline.scale * sharpness),
            np.ones(6),
            still,
        )

    monkeypatch.setattr(lora, "measure", measured)
    monkeypatch.setattr(lora, "load", lambda _: Pipeline())
    text, found = lora.compare("tiny", tmp_path, list(lora.measured_clips(6, 0.2)), [0.5, 1.0])
    assert found is gained
    assert f"higher in {sum(it > 0 for it in similarity)} of 6" in text
