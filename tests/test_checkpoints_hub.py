"""Downloads, of a hub on the loopback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import published_toy as toy
from command_line import run
from hub_server import COMMIT, Hub, hub_for, published_files
from stableavatar.checkpoints import hub, hub_cache
from stableavatar.checkpoints.defaults import read_defaults
from stableavatar.checkpoints.layout import find_published
from stableavatar.errors import CheckpointError, InputError
from toy import toy_pipeline


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub_for(monkeypatch, tmp_path / "cache") as server:
        yield server


def files_below(folder: Path) -> set[str]:
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {path for path in paths if not path.startswith(".cache/")}


def test_a_variant_is_downloaded_and_nothing_that_it_does_not_need(server: Hub, tmp_path: Path) -> None:
    target = hub.download(tmp_path / "my checkpoints", "square")
    everything = published_files()
    unneeded = {
        "StableAvatar-1.3B/transformer3d-rec-vec.pt",
        "Kim_Vocal_2.onnx",
        "README.md",
        "assets/figure.png",
    }
    assert files_below(target) == everything.keys() - unneeded
    assert all((target / path).read_bytes() == everything[path] for path in files_below(target))
    assert find_published(target).missing("square") == []

    # The other variant adds a file, and nothing is fetched twice.
    server.fetched.clear()
    hub.download(target, "rec-vec")
    assert server.fetched == ["StableAvatar-1.3B/transformer3d-rec-vec.pt"]
    assert find_published(target).missing("rec-vec") == []


def test_the_network_that_takes_music_away_comes_alone(server: Hub, tmp_path: Path) -> None:
    file = hub.download_vocal_separator(tmp_path / "checkpoints")
    assert server.fetched == ["Kim_Vocal_2.onnx"]
    assert file.read_bytes() == published_files()["Kim_Vocal_2.onnx"]
    assert files_below(tmp_path / "checkpoints") == {"Kim_Vocal_2.onnx"}


def test_14b_takes_the_encoders_from_one_repository_and_the_base_from_another(
    server: Hub, tmp_path: Path
) -> None:
    server.repositories[hub.BASE_14B_REPOSITORY] = {
        "config.json": b"{}",
        "diffusion_pytorch_model.safetensors.index.json": b"{}",
        "diffusion_pytorch_model-00001-of-00001.safetensors": b"weights",
        "Wan2.1_VAE.pth": b"the same as in the other",
    }
    target = hub.download(tmp_path / "checkpoints", size="14b")
    below = files_below(target)
    assert "Wan2.1-I2V-14B-480P/diffusion_pytorch_model-00001-of-00001.safetensors" in below
    assert "Wan2.1-I2V-14B-480P/Wan2.1_VAE.pth" not in below
    assert f"{toy.BASE}/diffusion_pytorch_model.safetensors" not in below
    assert [part.what for part in find_published(target).missing("square", "14b")] == [
        "the 14b transformer 'square'"
    ]


def test_token_and_revision_are_used(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_for_this_test")
    hub.download(tmp_path / "checkpoints", revision="v1")
    assert server.tokens == {"Bearer hf_for_this_test"}
    with pytest.raises(CheckpointError, match="has no revision 'v9'"):
        hub.download(tmp_path / "checkpoints", revision="v9")


def test_free_space_is_checked_before_anything_is_fetched(server: Hub, tmp_path: Path) -> None:
    server.stated_sizes[f"{toy.BASE}/{toy.T5}"] = 10**18
    with pytest.raises(InputError, match=r"1000000000\.0 GB are needed, .* GB are free"):
        hub.download(tmp_path / "checkpoints")
    assert server.fetched == []
    assert not (tmp_path / "checkpoints").exists()


def test_a_file_that_is_damaged_on_the_way_is_removed(server: Hub, tmp_path: Path) -> None:
    path = "StableAvatar-1.3B/transformer3d-square.pt"
    server.damaged.add(path)
    with pytest.raises(CheckpointError, match=r"transformer3d-square\.pt: damaged on the way"):
        hub.download(tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints" / path).exists()
    server.damaged.clear()
    hub.download(tmp_path / "checkpoints")
    assert (tmp_path / "checkpoints" / path).read_bytes() == published_files()[path]


def test_what_a_killed_download_left_is_removed_and_another_ones_is_not(server: Hub, tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "huggingface" / "download"
    folder.mkdir(parents=True)
    old, fresh = folder / "old.incomplete", folder / "fresh.incomplete"
    for path in (old, fresh):
        path.write_bytes(bytes(1000))
    other = tmp_path / "others" / "download.incomplete"  # of another program
    other.parent.mkdir()
    other.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    told: list[tuple[int, int]] = []
    hub.download(tmp_path, progress=lambda *there: told.append(there))
    assert not old.exists()
    assert fresh.exists()
    assert other.exists()
    assert told[-1][0] == told[-1][1] > 0


def test_errors_say_what_to_do(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        CheckpointError, match=r"nobody/nothing: no such repository at http://127\.0\.0\.1.*HF_TOKEN"
    ):
        hub.download(tmp_path / "a", repo_id="nobody/nothing")
    server.gated.add("some/gated")
    with pytest.raises(
        CheckpointError, match=r"access must be asked for at http://127\.0\.0\.1:\d+/some/gated"
    ):
        hub.download(tmp_path / "b", repo_id="some/gated")
    server.repositories["some/pictures"] = {"cat.png": b"meow"}
    with pytest.raises(CheckpointError, match="holds none of the files"):
        hub.download(tmp_path / "c", repo_id="some/pictures")
    with pytest.raises(InputError, match="is not the id of a hub repository"):
        hub.download(tmp_path / "d", repo_id="not/an/id")
    with pytest.raises(InputError, match="unknown variant 'round'"):
        hub.download(tmp_path / "e", "round")
    with pytest.raises(InputError, match="unknown model size '7b'"):
        hub.download(tmp_path / "f", size="7b")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        hub.download(tmp_path / "file" / "checkpoints")
    server.failing = True
    with pytest.raises(CheckpointError, match="answered 503"):
        hub.download(tmp_path / "g")


def test_no_connection(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(CheckpointError, match=r"http://127\.0\.0\.1:\d+ cannot be reached.*HF_ENDPOINT"):
        hub.download(tmp_path / "checkpoints")


def test_paths_stay_paths_and_ids_become_cached_folders(server: Hub, tmp_path: Path) -> None:
    assert hub.resolve(tmp_path) == tmp_path
    with pytest.raises(InputError, match="no such file or folder, nor the id"):
        hub.resolve(tmp_path / "absent")
    server.repositories["someone/tuned"] = {
        "model_index.json": b"{}",
        "transformer/config.json": b"{}",
        "notes.txt": b"private",
    }
    folder = hub.resolve("someone/tuned")
    assert folder.is_relative_to(tmp_path / "cache")
    assert files_below(folder) == {"model_index.json", "transformer/config.json"}
    published = hub.resolve(hub.PUBLISHED_REPOSITORY, variant="rec-vec")
    assert find_published(published).missing("rec-vec") == []
    assert set(find_published(published).overlays["1.3b"]) == {"rec-vec"}

    # Without a connection, what was fetched once is found again, and nothing else.
    server.shutdown()
    server.server_close()
    assert hub.resolve("someone/tuned") == folder
    assert hub.resolve(hub.PUBLISHED_REPOSITORY, variant="rec-vec") == published
    with pytest.raises(CheckpointError, match="cannot be reached, and there is no complete copy here"):
        hub.resolve("someone/else")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(CheckpointError, match="cannot be reached"):
        hub.resolve("someone/tuned")


def test_the_settings_of_an_own_repository_are_known_without_its_weights(server: Hub) -> None:
    index = {"sampling_defaults": {"steps": 7, "sizes": {"square": [128, 128]}}}
    server.repositories["someone/tuned"] = {"model_index.json": json.dumps(index).encode()}
    defaults = read_defaults("someone/tuned")
    assert (defaults.steps, dict(defaults.sizes)) == (7, {"square": (128, 128)})
    assert read_defaults(hub.PUBLISHED_REPOSITORY, variant="rec-vec").steps == 50
    assert set(server.fetched) == {"model_index.json"}


def test_a_download_that_lacks_something_is_not_called_complete(server: Hub, tmp_path: Path) -> None:
    files = server.repositories[hub.PUBLISHED_REPOSITORY]
    (transformer,) = (name for name in files if name.endswith("transformer3d-rec-vec.pt"))
    del files[transformer]
    result = run("download", "--output", tmp_path, "--variant", "rec-vec")
    assert result.exit_code == 2
    assert "rec-vec" in result.stderr
    result = run("download", "--output", tmp_path)
    assert result.exit_code == 0
    assert "--model" in result.stdout


def test_an_own_repository_is_fetched_as_asked(server: Hub, tmp_path: Path) -> None:
    server.repositories["someone/tuned"] = {"model_index.json": b"{}", "transformer/config.json": b"{}"}
    folder = hub.resolve("someone/tuned", revision="v1", token="hf_mine", cache_dir=tmp_path / "elsewhere")
    assert folder.is_relative_to(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "models--someone--tuned" / "refs" / "v1").read_text() == COMMIT
    assert not (tmp_path / "cache").exists()
    assert server.tokens == {"Bearer hf_mine"}
    with pytest.raises(CheckpointError, match="has no revision 'v9'"):
        hub.resolve("someone/tuned", revision="v9")


def test_only_the_size_that_is_asked_for_is_fetched(server: Hub) -> None:
    trained = {
        "Wan2.1-I2V-14B-480P/config.json",
        "Wan2.1-I2V-14B-480P/diffusion_pytorch_model.safetensors",
        "StableAvatar-14B/transformer3d-square.safetensors",
    }
    files = {**published_files(), **dict.fromkeys(trained, b"weights")}
    server.repositories["someone/published"] = files
    small = files_below(hub.resolve("someone/published"))
    assert not small & trained
    shutil.rmtree(hub.resolve("someone/published"))
    large = hub.resolve("someone/published", size="14b")
    assert files_below(large) >= trained
    assert f"{toy.BASE}/diffusion_pytorch_model.safetensors" not in files_below(large)
    assert find_published(large).missing("square", "14b") == []
    with pytest.raises(InputError, match="unknown model size '7b'"):
        hub.resolve("someone/published", size="7b")


OWN = {
    "model_index.json": b"{}",
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model.safetensors": b"weights",
}


def test_room_is_looked_for_before_a_cached_repository_is_fetched(server: Hub, tmp_path: Path) -> None:
    server.repositories["someone/tuned"] = OWN
    server.stated_sizes["transformer/diffusion_pytorch_model.safetensors"] = 10**18
    with pytest.raises(InputError, match=r"1000000000\.0 GB are needed"):
        hub.resolve("someone/tuned")
    assert server.fetched == []
    server.stated_sizes.clear()
    hub.resolve("someone/tuned")
    server.stated_sizes["transformer/diffusion_pytorch_model.safetensors"] = 10**18
    hub.resolve("someone/tuned")  # it is there


def test_a_cached_file_that_is_damaged_on_the_way_is_removed(server: Hub, tmp_path: Path) -> None:
    weights = "transformer/diffusion_pytorch_model.safetensors"
    server.repositories["someone/tuned"] = OWN
    server.damaged.add(weights)
    with pytest.raises(CheckpointError, match=f"someone/tuned: {weights} came damaged on the way"):
        hub.resolve("someone/tuned")
    server.damaged.clear()
    folder = hub.resolve("someone/tuned")
    assert (folder / weights).read_bytes() == OWN[weights]
    assert not list((tmp_path / "cache").rglob(hub_cache.UNCHECKED))


def test_what_was_not_checked_when_the_process_ended_is_checked_by_the_next(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = "transformer/diffusion_pytorch_model.safetensors"
    server.repositories["someone/tuned"] = OWN
    server.damaged.add(weights)

    def killed(_path: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hub_cache, "sha256_of", killed)
        with pytest.raises(KeyboardInterrupt):
            hub.resolve("someone/tuned")
    server.shutdown()
    server.server_close()
    with pytest.raises(CheckpointError, match="came damaged on the way"):
        hub.resolve("someone/tuned")


def test_what_was_checked_is_not_read_again(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repositories["someone/tuned"] = OWN
    read: list[Path] = []
    whole = hub_cache.sha256_of
    monkeypatch.setattr(hub_cache, "sha256_of", lambda path: read.append(path) or whole(path))
    folder = hub.resolve("someone/tuned")
    assert len(read) == 1
    assert hub.resolve("someone/tuned") == folder
    assert hub.resolve("someone/tuned", local_files_only=True) == folder
    server.shutdown()
    server.server_close()
    assert hub.resolve("someone/tuned") == folder
    assert len(read) == 1


def test_a_lora_by_its_repository(server: Hub, tmp_path: Path) -> None:
    pipeline, other = toy_pipeline(), toy_pipeline()
    factors = {"lora_A.weight": torch.ones(2, 32), "lora_B.weight": torch.ones(32, 2)}
    state = {f"base_model.model.blocks.0.attn1.to_q.{name}": factor for name, factor in factors.items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 1}')
    server.repositories["someone/lora"] = {
        f"in/{name}": (tmp_path / name).read_bytes()
        for name in ("adapter_model.safetensors", "adapter_config.json")
    }
    pipeline.load_lora_weights("someone/lora", weight_name="in/adapter_model.safetensors", revision="v1")
    other.load_lora_weights(tmp_path)
    ours, theirs = (it.transformer.state_dict() for it in (pipeline, other))
    assert any("lora" in name for name in ours)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    for arguments, what in (
        ({}, "as weight_name"),
        ({"weight_name": "absent.safetensors"}, "someone/lora: has no file absent.safetensors"),
        ({"weight_name": "x", "revision": "v9"}, "has no revision 'v9'"),
    ):
        with pytest.raises((InputError, CheckpointError), match=what):
            other.load_lora_weights("someone/lora", **arguments)
    with pytest.raises(CheckpointError, match="nobody/nothing: no such repository"):
        other.load_lora_weights("nobody/nothing", weight_name="x.safetensors")
    with pytest.raises(InputError, match="revision cannot be used with a LoRA"):
        other.load_lora_weights(tmp_path, revision="v1")


def test_a_repository_without_a_model_is_named(server: Hub) -> None:
    server.repositories["some/pictures"] = {"cat.png": b"meow"}
    with pytest.raises(CheckpointError, match="some/pictures: holds no model"):
        hub.resolve("some/pictures")
