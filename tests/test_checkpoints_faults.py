"""Checkpoint files that are damaged, of something else, or would run code: refused, with the reason."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import published_toy as toy
from stableavatar.checkpoints import loading
from stableavatar.checkpoints.files import read_state_dict
from stableavatar.errors import CheckpointError


class _Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(zipped: bool, tmp_path: Path) -> None:
    """Fault 14: the published code unpickles whatever it is given."""
    trace = tmp_path / "executed"
    file = tmp_path / "transformer3d-square.pt"
    content = {"blocks.0.modulation": torch.zeros(1), "x": _Malicious(f"touch {trace}")}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"transformer3d-square\.pt: refused, for it would run code"):
        read_state_dict(file)
    assert not trace.exists()
    torch.load(file, weights_only=False)  # the file does what it says
    assert trace.exists()


def test_loading_never_writes_to_the_file(published: Path) -> None:
    """Files are memory-mapped; a model that is trained must not reach into them."""
    for file in (
        published / toy.BASE / "diffusion_pytorch_model.safetensors",
        published / toy.BASE / "Wan2.1_VAE.pth",
    ):
        before = file.read_bytes()
        for tensor in read_state_dict(file).values():
            tensor.add_(1)
        assert file.read_bytes() == before


def damaged(kind: str, folder: Path) -> Path:
    good = folder / "good.safetensors"
    save_file({"a": torch.zeros(100)}, good)
    torch.save({"a": torch.zeros(100)}, folder / "good.pt")
    content = {
        "empty": b"",
        "truncated": good.read_bytes()[:-50],
        "truncated_pt": (folder / "good.pt").read_bytes()[:-50],
        "noise": b"\x07\x01\x02 no tensors here" * 9,
        "web_page": b"<!DOCTYPE html><html>404</html>",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
        "text": b"hello",
    }
    file = folder / f"{kind}.pt"
    if kind in content:
        file.write_bytes(content[kind])
    elif kind == "not_a_dict":
        torch.save([torch.zeros(2)], file)
    elif kind == "no_tensor":
        torch.save({"a": torch.zeros(2), "epoch": 3}, file)
    return file


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "cannot be read"),
        ("empty", "is empty"),
        ("truncated", "damaged or incomplete"),
        ("truncated_pt", "damaged, incomplete"),
        ("noise", "damaged, incomplete, or not a checkpoint"),
        ("text", "not a checkpoint"),
        ("web_page", "web page"),
        ("pointer", "Git LFS pointer"),
        ("not_a_dict", "holds a list"),
        ("no_tensor", "'epoch' is a int"),
    ],
)
def test_damaged_files_say_what_is_wrong(kind: str, message: str, tmp_path: Path) -> None:
    file = damaged(kind, tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_state_dict(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_without_weights_and_indices_that_leave_their_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_state_dict(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        read_state_dict(tmp_path)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"1 tensors are missing: blocks\.1\.attn1\.to_q\.bias \(24,\)"),
        ("surplus", r"1 are unknown: blocks\.0\.mystery \(3,\)"),
        ("misshapen", r"1 have another shape: blocks\.0\.attn2\.k_vocal\.bias is \(25,\), should be \(24,\)"),
        ("many", r"and \d+ more"),
    ],
)
def test_every_tensor_out_of_place_is_named(change: str, message: str, tmp_path: Path) -> None:
    state = toy.published_transformer(0)
    if change == "missing":
        del state["blocks.1.self_attn.q.bias"]
    elif change == "surplus":
        state["blocks.0.mystery"] = torch.zeros(3)
    elif change == "misshapen":
        state["blocks.0.cross_attn.k_vocal.bias"] = torch.zeros(25)
    else:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.1.self_attn")}
    save_file(state, tmp_path / "wrong.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        loading.load_transformer(tmp_path / "wrong.safetensors", config={"num_attention_heads": 2})
    assert "wrong.safetensors" in str(caught.value)


def test_an_overlay_of_another_size_is_blamed_rather_than_the_base(published: Path, tmp_path: Path) -> None:
    save_file(toy.published_transformer(0, num_layers=3), tmp_path / "larger.safetensors")
    overlay = toy.published_transformer(0)
    overlay["blocks.0.ffn.0.bias"] = torch.zeros(9)
    save_file(overlay, tmp_path / "overlay.safetensors")
    with pytest.raises(CheckpointError, match=r"overlay\.safetensors: is not a checkpoint of this model"):
        loading.load_transformer(
            tmp_path / "larger.safetensors",
            tmp_path / "overlay.safetensors",
            config={"num_heads": 2, "dim": 24},
        )


def test_a_checkpoint_of_something_else(published: Path, tmp_path: Path) -> None:
    vae = published / toy.BASE / "Wan2.1_VAE.pth"
    with pytest.raises(CheckpointError, match="not a checkpoint of the video transformer"):
        loading.load_transformer(vae)
    with pytest.raises(CheckpointError, match="not a checkpoint of a UMT5"):
        loading.load_text_encoder(vae)
    with pytest.raises(CheckpointError, match="not a checkpoint of the CLIP"):
        loading.load_image_encoder(vae)
    with pytest.raises(CheckpointError, match="not a checkpoint of the Wan"):
        loading.load_vae(published / toy.BASE / toy.T5)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        loading.load_speech_encoder(vae)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        loading.load_tokenizer(tmp_path)


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize(
    ("content", "words"),
    [('{"version": "1.0", "mod', "cannot be read as JSON"), ('{"version": "1.0"}', "holds no tokenizer")],
)
def test_a_damaged_tokenizer(tmp_path: Path, with_config: bool, content: str, words: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    if with_config:
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json: {words}"):
        loading.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: cannot be read as JSON"):
        loading.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"num_heads": "two", "dim": 24}, "invalid literal"), ({"num_attention_heads": None}, "int()")],
)
def test_settings_that_cannot_be(published: Path, settings: dict[str, object], words: str) -> None:
    with pytest.raises(CheckpointError, match="no model can be built with these settings") as caught:
        loading.load_transformer(published / toy.BASE, config=settings)
    assert words in str(caught.value)
