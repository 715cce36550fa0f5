"""What a checkpoint in the middle of a training holds is what a training that ends there writes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from command_line import run
from published_toy import write_published
from recipe_toys import SQUARE, toy, write_data
from stableavatar.checkpoints import loading
from stableavatar.errors import CheckpointError
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.training.checkpoints import list_checkpoints
from stableavatar.training.recipes import load_recipe
from stableavatar.training.result import export_checkpoint
from stableavatar.training.run import prepare_training

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path)


def train(data: Path, out: Path, *more: str) -> Path:
    """Two steps of four, or what is told; the first checkpoint."""
    chosen = toy(data, out, "trainer.checkpoint_every=2", "trainer.ema_decay=0.9", *more)
    prepare_training(load_recipe(SQUARE, chosen)).run()
    return list_checkpoints(out)[0]


@pytest.mark.parametrize("more", [[], ["trainer.ema_decay=0.0"], ["lora.rank=2"], ["model.variant=null"]])
def test_of_a_middle_step(data: Path, tmp_path: Path, more: list[str]) -> None:
    if "model.variant=null" in more:  # from a base model, whose adapter starts anew
        write_published(tmp_path / "base")
        more = [*more, f"model.source={tmp_path / 'base'}"]
    train(data, tmp_path / "short", *more)
    middle = train(data, tmp_path / "long", "trainer.steps=4", *more)
    assert middle.name == "step-00000002"
    made = run("export", middle, tmp_path / "exported")
    assert made.exit_code == 0, made.output
    files = sorted(
        it.relative_to(tmp_path / "exported") for it in (tmp_path / "exported").rglob("*.safetensors")
    )
    assert [file.parts[0] for file in files] == (["lora"] if "lora.rank=2" in more else ["transformer"])
    for file in files:
        found, wanted = (load_file(tmp_path / name / file) for name in ("exported", "short"))
        late = load_file(tmp_path / "long" / file)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        assert not all(torch.equal(late[name], value) for name, value in wanted.items())


def test_under_the_published_names(data: Path, tmp_path: Path) -> None:
    checkpoint = train(data, tmp_path / "run")
    made = run("export", checkpoint, tmp_path / "transformer.pt")
    assert made.exit_code == 0, made.output
    base = StableAvatarTransformer3DModel.from_pretrained(tmp_path / "run" / "transformer")
    found = loading.load_transformer(tmp_path / "transformer.pt", config=dict(base.config), dtype=None)
    for name, value in base.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    assert not list(tmp_path.glob(".export-*"))
    again = run("export", checkpoint, tmp_path / "transformer.pt")
    assert again.exit_code == 2
    assert "exists already" in again.stderr


def test_what_it_started_from_is_there_no_more(data: Path, tmp_path: Path) -> None:
    write_published(tmp_path / "base")
    checkpoint = train(data, tmp_path / "run", "model.variant=null", f"model.source={tmp_path / 'base'}")
    (file,) = (tmp_path / "base").rglob("diffusion_pytorch_model.safetensors")
    save_file({name: value * 1.1 for name, value in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match="other weights than"):
        export_checkpoint(checkpoint, tmp_path / "out")
    (checkpoint / "model.safetensors").write_bytes(b"no")
    assert run("export", checkpoint, tmp_path / "out").exit_code == 2


def test_a_lora_is_no_transformer(data: Path, tmp_path: Path) -> None:
    checkpoint = train(data, tmp_path / "run", "lora.rank=2")
    refused = run("export", checkpoint, tmp_path / "out.pt")
    assert refused.exit_code == 2
    assert "name a folder" in refused.stderr
