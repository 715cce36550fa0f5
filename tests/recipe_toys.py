"""Recipes at toy size, and clips for them."""

from pathlib import Path

from clip_folders import write_clip
from command_line import toy_model

# That of `tiny` is run in test_training_tiny_transformer.py.
RECIPES = sorted(
    path
    for path in (Path(__file__).parents[1] / "recipes").glob("*.yaml")
    if not path.stem.startswith("tiny")
)
SQUARE = RECIPES[0].with_name("1.3b-square.yaml")


def write_data(root: Path) -> Path:
    """A path list of four clips of two sizes."""
    for k in range(4):
        write_clip(root / "speech" / f"{k:05d}", frames=12, size=(32, 32) if k < 2 else (48, 32))
    (root / "list.txt").write_text("".join(f"speech/{k:05d}\n" for k in range(4)))
    return root / "list.txt"


def toy(data: Path, output: Path, *more: str) -> list[str]:
    """What brings any recipe to toy size."""
    return [
        f"output={output}", f"model.source={toy_model()}", "model.variant=null", "model.transformer=null",
        "model.encoder_dtype=float32", f"data.lists=[{data}]", "data.sizes=null", "data.clips.frames=9",
        "trainer.steps=2", "trainer.workers=0", "trainer.precision=fp32", "trainer.sharding=none", "trainer.log_every=1",
        "trainer.optimizer.warmup_steps=1", *more,
    ]  # fmt: skip
