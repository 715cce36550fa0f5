"""The parity runner on cases made here, and on the recorded ones where they lie beside the checkout."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stableavatar.checkpoints.loading import published_state_dict
from stableavatar.evaluation.parity import main
from toy import toy_transformer

RECORDED = Path(__file__).parents[2] / "shared" / "parity"


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one transformer case, recorded from the toy model under published names."""
    folder = tmp_path_factory.mktemp("parity") / "any name"
    folder.mkdir()
    model = toy_transformer(audio_heads=8)  # as published; no config says it
    save_file(
        {k: v.detach().contiguous() for k, v in published_state_dict(model).items()}, folder / "w.safetensors"
    )
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {
        "in.x": draw(3, 16, 3, 4, 4),
        "in.y": draw(3, 20, 3, 4, 4),
        "in.t": torch.full((3,), 500.0),
        "in.portrait_embeddings": draw(1, 5, 32),
        "in.speech_features": draw(3, 20, 24),
        **{f"in.context.{row}": draw(length, 16) for row, length in enumerate((9, 9, 5))},
    }
    prompts = torch.stack(
        [
            torch.nn.functional.pad(tensors[f"in.context.{row}"], (0, 0, 0, 48 - length))
            for row, length in enumerate((9, 9, 5))
        ]
    )
    with torch.no_grad():
        tensors["out"] = model(
            tensors["in.x"],
            tensors["in.y"],
            tensors["in.t"],
            prompts,
            tensors["in.portrait_embeddings"],
            tensors["in.speech_features"][-1:],
            [None, 0, 0],
        ).sample
    save_file(tensors, folder / "case.safetensors")
    sizes = {
        "dim": 32,
        "num_heads": 2,
        "ffn_dim": 64,
        "freq_dim": 32,
        "text_dim": 16,
        "text_len": 48,
        "num_layers": 2,
    }
    config = {"kind": "transformer", "transformer": sizes, "weights": {"transformer": "w.safetensors"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder.parent


def change(cases: Path, target: Path, **config: object) -> Path:
    folder = target / "case folder"
    folder.mkdir(parents=True)
    source = cases / "any name"
    for file in source.glob("*.safetensors"):
        save_file(load_file(file), folder / file.name)
    settings = {**json.loads((source / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_a_case_that_holds(cases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(cases)]) == 0
    assert "1 passed, 0 failed" in capsys.readouterr().out
    assert main([str(cases / "any name")]) == 0


def test_another_result_fails_and_the_rest_still_runs(
    cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = change(cases, tmp_path)
    tensors = load_file(folder / "case.safetensors")
    tensors["out"][0, 0, 0, 0, 0] += 1e-3
    save_file(tensors, folder / "case.safetensors")
    (tmp_path / "a folder without a config").mkdir()
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "FAIL case folder/case: 1.00e-03" in out
    assert "FAIL a folder without a config" in out
    assert "0 passed, 2 failed" in out


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"kind": "unheard of"}, "its kind is 'unheard of'"),
        ({"weights": {}}, "'transformer' is missing"),
        ({"weights": {"transformer": "absent.safetensors"}}, "absent.safetensors"),
    ],
)
def test_what_cannot_be_run_fails(
    cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], config: dict[str, object], said: str
) -> None:
    change(cases, tmp_path, **config)
    assert main([str(tmp_path)]) == 1
    assert said in capsys.readouterr().out


def test_a_folder_of_weights_alone_holds_nothing(
    cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (change(cases, tmp_path) / "case.safetensors").unlink()
    assert main([str(tmp_path)]) == 1
    assert "held nothing" in capsys.readouterr().out


def test_no_folder_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert main([str(tmp_path / "absent")]) == 2
    capsys.readouterr()


@pytest.mark.shared
@pytest.mark.skipif(not RECORDED.is_dir(), reason="the recorded cases are not beside the checkout")
def test_every_recorded_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(RECORDED)]) == 0
    kinds = {json.loads(file.read_text())["kind"] for file in RECORDED.glob("*/config.json")}
    assert kinds == {"transformer", "vae", "text_encoder", "image_encoder", "loop"}
    capsys.readouterr()
