"""The trainer: exact resuming, atomic checkpoints, bad steps, the log, what is trained."""

import json
import multiprocessing
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from fitting import Fit, Points, assert_same_run, final, losses, make, settings
from stableavatar.errors import CheckpointError, InputError
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.training.checkpoints import (
    CheckpointWriter,
    list_checkpoints,
    load_checkpoint,
    random_state,
)
from stableavatar.training.ema import MovingAverage
from stableavatar.training.objective import StepLoss
from stableavatar.training.parameters import freeze_others, trained_by_recipe, trained_parameters
from stableavatar.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    make(tmp_path / "whole").train()
    make(tmp_path / "parts", steps=7).train()  # a stop between two lines of the log and two checkpoints
    torch.manual_seed(999)
    rest = make(tmp_path / "parts")
    rest.resume("latest")
    assert rest.step == 7
    result = rest.train()
    assert (result.step, result.skipped_steps) == (12, 0)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_what_a_killed_run_did_after_its_checkpoint_is_done_again(tmp_path: Path) -> None:
    make(tmp_path / "whole").train()
    killed = make(tmp_path / "killed", steps=9)
    killed.save = lambda: Path() if killed.step > 5 else Trainer.save(killed)  # type: ignore[method-assign]
    killed.train()
    assert [line["step"] for line in losses(tmp_path / "killed")] == [3, 6, 9]
    rest = make(tmp_path / "killed")
    rest.resume("latest")
    assert rest.step == 5
    rest.train()
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def train_on(folder: Path) -> None:
    """In a process of its own: goes on with a run that has no end, a checkpoint a step."""
    torch.set_num_threads(1)
    trainer = make(folder, steps=10**6, checkpoint_every=1)
    if list_checkpoints(folder):
        trainer.resume("latest")
    trainer.train()


def test_ten_kills_at_any_moment_change_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    # Else each of them would import torch anew.
    context.set_forkserver_preload(
        ["pytest", "stableavatar.models.transformer", "stableavatar.training.trainer"]
    )
    moments = random.Random(7)
    for _ in range(10):
        before = list_checkpoints(tmp_path)
        process = context.Process(target=train_on, args=(tmp_path,))
        process.start()
        while list_checkpoints(tmp_path)[-1:] == before[-1:]:
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
    step = load_checkpoint(list_checkpoints(tmp_path)[-1]).counters["step"]
    assert step >= 10

    rest = make(tmp_path, steps=step + 2, checkpoint_every=1)
    rest.resume("latest")
    rest.train()
    make(tmp_path / "whole", steps=step + 2, checkpoint_every=1).train()
    assert_same_run(tmp_path / "whole", tmp_path)
    assert not list(tmp_path.glob(".step-*"))


class HeavyPoints(Points):
    """Samples that do not fit into the line between a reader and who trains."""

    def __getitem__(self, key: tuple[int, int]) -> Any:
        return np.resize(super().__getitem__(key).numpy(), 500_000)


def read_on(folder: Path, steps: int = 10**6, *, go_on: bool = False) -> None:
    """A run whose reader always has something to hand on."""

    def prepare(batch: list[Any], _: torch.device) -> torch.Tensor:
        return torch.stack([torch.from_numpy(sample[:2]) for sample in batch])

    torch.set_num_threads(1)
    chosen = settings(steps=steps, checkpoint_every=1, workers=1)
    trainer = Trainer(Fit(), HeavyPoints(), list, chosen, folder, prepare=prepare)
    if go_on:
        trainer.resume("latest")
    trainer.train()


def test_a_killed_run_leaves_no_reader_and_its_folder_free(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=read_on, args=(tmp_path,))
    process.start()
    until = time.monotonic() + 60
    while not list_checkpoints(tmp_path):
        assert process.is_alive()
        assert time.monotonic() < until
        time.sleep(0.01)
    readers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.join()
    assert readers
    assert not psutil.wait_procs(readers, timeout=20)[1]
    step = load_checkpoint(list_checkpoints(tmp_path)[-1]).counters["step"]
    read_on(tmp_path, step + 1, go_on=True)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    refused = []

    def begin_another(_: int) -> None:
        with pytest.raises(InputError, match="a training runs in") as error:
            make(folder, steps=3).train()
        refused.append(str(error.value))

    first = Trainer(
        Fit(), Points(), torch.stack, settings(callback_every=6), folder, callbacks=[begin_another]
    )
    first.train()
    assert len(refused) == 2
    assert len(losses(folder)) == 4
    again = make(folder, steps=15)
    again.resume("latest")
    again.train()


def save_checkpoint(folder: Path, step: int, keep: int) -> Path:
    """One of a run in one process, whose weight is the step."""
    writer = CheckpointWriter(folder, step)
    writer.begin()
    writer.write_tensors("model.safetensors", {"w": torch.tensor([float(step)])})
    writer.write_object("optimizer.pt", {})
    writer.write_object("random-0.pt", random_state())
    return writer.finish({"step": step}, keep)


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, keep=2)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(CheckpointError, match="No space left"):
            save_checkpoint(tmp_path, 2, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    for step in (2, 3, 4):
        save_checkpoint(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    assert load_checkpoint(tmp_path / "step-00000004").model["w"].item() == 4


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, keep=1)
    (path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="step-00000001"):
        load_checkpoint(path)


def test_bad_steps_are_skipped_counted_and_end_the_run(tmp_path: Path) -> None:
    whole = make(tmp_path / "good", Fit(poison=(3, 8)), accumulation=1).train()
    assert whole.skipped_steps == 2
    assert all(value.isfinite().all() for value in final(tmp_path / "good").values())

    bad = make(tmp_path / "bad", Fit(poison=tuple(range(7, 100))), accumulation=1, steps=100, max_bad_steps=4)
    with pytest.raises(InputError, match="4 steps in a row up to step 10"):
        bad.train()
    assert bad.skipped_steps == 4
    assert [path.name for path in list_checkpoints(tmp_path / "bad")] == ["step-00000005"]


@pytest.mark.parametrize("kind", ["nan", "infinite loss, finite gradient", "finite loss, infinite gradient"])
def test_a_bad_micro_step_skips_the_whole_step(tmp_path: Path, kind: str) -> None:
    trainer = make(tmp_path, Fit(poison=(1,), kind=kind), steps=1)
    before = {name: value.detach().clone() for name, value in trainer.parameters.items()}
    with pytest.raises(InputError, match="none of 1 steps was taken"):
        trainer.train()
    assert trainer.skipped_steps == 1
    assert all(torch.equal(before[name], value) for name, value in trainer.parameters.items())


def test_trackers_get_the_log(tmp_path: Path) -> None:
    trainer = make(tmp_path, steps=6, trackers=("tensorboard",))
    trainer.train()
    trainer.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "trackers" / "stableavatar")).Reload()
    drawn = [(event.step, event.value) for event in events.Scalars("loss")]
    assert drawn == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in losses(tmp_path)]


def test_weights_and_biases_gets_the_log_beside_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline; the file is W&B's own, in which values stand as JSON."""
    pytest.importorskip("wandb", reason="in the extra large; see make test-large")
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer = make(tmp_path / "run", steps=6, trackers=("wandb",))
    trainer.train()
    trainer.close()
    (file,) = (tmp_path / "run" / "trackers").rglob("run-*.wandb")
    written = file.read_bytes()
    logged = losses(tmp_path / "run")
    assert len(logged) == 2
    for line in logged:
        assert str(line["loss"])[:12].encode() in written
    assert b"learning_rate" in written


def test_the_log_splits_the_loss_by_sigma(tmp_path: Path) -> None:
    make(tmp_path, steps=12, log_every=12).train()
    (line,) = losses(tmp_path)
    parts = [line[f"loss_{low:.2f}_{low + 0.25:.2f}"] for low in (0.0, 0.25, 0.5, 0.75)]
    assert all(part is not None for part in parts)
    assert min(parts) < line["loss"] < max(parts)
    assert len(set(parts)) == 4


def test_averaged_weights_in_callbacks_which_cannot_disturb_the_run(tmp_path: Path) -> None:
    module = Fit()
    seen: list[tuple[int, float, bool]] = []

    def look(step: int) -> None:
        torch.rand(5)
        seen.append((step, module.layers[0].weight.sum().item(), module.training))

    watched = Trainer(
        module, Points(), torch.stack, settings(callback_every=6), tmp_path / "watched", callbacks=[look]
    )
    torch.manual_seed(1)
    watched.train()
    assert watched.ema is not None
    assert [(step, training) for step, _, training in seen] == [(6, False), (12, False)]
    assert seen[-1][1] == pytest.approx(watched.ema.state["layers.0.weight"].sum().item(), rel=1e-6)
    assert seen[-1][1] != pytest.approx(module.layers[0].weight.sum().item(), rel=1e-6)
    alone = make(tmp_path / "alone")
    torch.manual_seed(1)
    alone.train()
    assert_same_run(tmp_path / "alone", tmp_path / "watched")


def test_a_callback_that_fails_does_not_take_the_checkpoint_with_it(tmp_path: Path) -> None:
    def fail(_step: int) -> None:
        raise InputError("no room for a video")

    made = settings(callback_every=5)
    trainer = Trainer(Fit(), Points(), torch.stack, made, tmp_path, callbacks=[fail])
    with pytest.raises(InputError, match="no room"):
        trainer.train()
    again = Trainer(Fit(), Points(), torch.stack, made, tmp_path)
    again.resume("latest")
    assert again.step == 5


def test_an_error_ends_the_process_though_readers_ignore_signals(tmp_path: Path) -> None:
    script = f"""if True:
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        import torch
        from fitting import Fit, Points, settings
        from stableavatar.training.trainer import Trainer

        def fail(step):
            raise RuntimeError("not foreseen")

        made = settings(workers=1, callback_every=1)
        Trainer(Fit(), Points(), torch.stack, made, Path({str(tmp_path)!r}), callbacks=[fail]).train()
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "not foreseen" in done.stderr


def test_moving_average_forgets_its_start() -> None:
    weight = nn.Parameter(torch.zeros(1))
    average = MovingAverage({"w": weight}, 0.5)
    with torch.no_grad():
        weight.fill_(1.0)
    average.update()  # decay min(0.5, 1/10)
    assert average.state["w"].item() == pytest.approx(0.9)
    average.update()  # decay min(0.5, 2/11)
    assert average.state["w"].item() == pytest.approx(0.9 * 2 / 11 + 9 / 11)


def test_minutes_and_requests_stop_with_a_checkpoint(tmp_path: Path) -> None:
    result = make(tmp_path / "time", steps=10**6, minutes=0.01, checkpoint_every=10**5).train()
    assert 0 < result.step < 10**6
    assert result.checkpoint.name == f"step-{result.step:08d}"

    class Stopper(Points):
        def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
            trainer.request_stop()
            return super().__getitem__(key)

    trainer = Trainer(Fit(), Stopper(), torch.stack, settings(), tmp_path / "asked")
    assert trainer.train().step == 1
    assert [path.name for path in list_checkpoints(tmp_path / "asked")] == ["step-00000001"]


def test_resuming_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        make(tmp_path).resume("latest")
    make(tmp_path, steps=1).train()
    with pytest.raises(InputError, match="another batch_size"):
        make(tmp_path, batch_size=3).resume("latest")

    class More(Points):
        groups = (*Points.groups, "small")
        fingerprint = "eight points"

    other = Trainer(Fit(), More(), torch.stack, settings(), tmp_path)
    with pytest.raises(InputError, match="another clips"):
        other.resume("latest")
    other.resume("latest", new_data=True)
    assert other.step == 1

    class Wider(Fit):
        def __init__(self) -> None:
            super().__init__()
            self.layers[3] = nn.Linear(6, 2)

    with pytest.raises(CheckpointError, match=r"layers\.3"):
        make(tmp_path, Wider()).resume("latest")


def test_a_run_does_not_write_among_later_checkpoints(tmp_path: Path) -> None:
    make(tmp_path, steps=10).train()
    with pytest.raises(InputError, match="up to step-00000010, and this run stands at step 0"):
        make(tmp_path).train()
    earlier = make(tmp_path)
    earlier.resume(tmp_path / "step-00000005")
    with pytest.raises(InputError, match="stands at step 5"):
        earlier.train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000005", "step-00000010"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"norm": 0.0}, "clip norm"),
        ({"abnormal_ratio": 0.5}, "abnormal_ratio"),
        ({"start_ratio": 0.5}, "start_ratio"),
        ({"kind": "adam"}, "kind must be one of"),
        ({"schedule": "cosinus"}, "schedule must be one of"),
        ({"decay_steps": 3}, "needs the schedule"),
        ({"sharding": "fsdp3"}, "sharding must be one of"),
        ({"trackers": ("paper",)}, "'paper' is none"),
        ({"minutes": 0}, "minutes"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(**values)


def small_transformer() -> StableAvatarTransformer3DModel:
    return StableAvatarTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, text_dim=8, text_length=4, freq_dim=16, ffn_dim=16,
        num_layers=2, image_dim=8, audio_dim=6, audio_layers=1, audio_heads=1,
    )  # fmt: skip


def test_the_recipe_trains_blocks_and_adapter_alone() -> None:
    model = small_transformer()
    freeze_others(model, trained_by_recipe)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {
        "patch_embedding", "condition_embedder", "proj_out", "scale_shift_table",
    }  # fmt: skip
    assert {name.split(".")[0] for name in trained_parameters(model)} == {"blocks", "vocal_projector"}
    with pytest.raises(InputError, match="no parameter"):
        trained_by_recipe("decoder.weight")
    freeze_others(model, lambda _: False)
    with pytest.raises(InputError, match="no parameter of the model is trained"):
        trained_parameters(model)


class Velocity(nn.Module):
    """The real transformer at toy size; its inputs are made of the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transformer = small_transformer()
        self.register_buffer("context", torch.randn(1, 4, 8))

    def forward(self, batch: torch.Tensor, generator: torch.Generator) -> StepLoss:
        rows = len(batch)
        latents = torch.randn(rows, 16, 2, 4, 4, generator=generator)
        velocity = self.transformer(
            latents, torch.zeros(1, 20, 2, 4, 4), torch.full((rows,), 500.0), self.context.expand(rows, -1,
            -1), self.context, torch.ones(rows, 9, 6),
        ).sample  # fmt: skip
        error = ((velocity - batch.mean()) ** 2).flatten(1).mean(1)
        return StepLoss(error.mean(), error.detach(), torch.full((rows,), 0.5))


def test_gradient_checkpointing_changes_no_number(tmp_path: Path) -> None:
    make(tmp_path / "plain", Velocity(), steps=2).train()
    module = Velocity()
    make(tmp_path / "saving", module, steps=2, gradient_checkpointing=True).train()
    assert module.transformer.gradient_checkpointing
    assert_same_run(tmp_path / "plain", tmp_path / "saving")
    with pytest.raises(InputError, match="gradient_checkpointing"):
        make(tmp_path / "none", Fit(), gradient_checkpointing=True)


def test_bf16_is_an_autocast_of_the_forward_pass(tmp_path: Path) -> None:
    seen = []

    class Watched(Velocity):
        def forward(self, batch: torch.Tensor, generator: torch.Generator) -> StepLoss:
            seen.append(nn.functional.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype)
            return super().forward(batch, generator)

    trainer = make(tmp_path, Watched(), steps=1, precision="bf16")
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in trainer.parameters.values())


def test_only_trained_parameters_are_saved_and_frozen_ones_stay(tmp_path: Path) -> None:
    module = Fit()
    freeze_others(module, lambda name: name.startswith("layers.3"))
    before = module.layers[0].weight.detach().clone()
    make(tmp_path, module, steps=2).train()
    assert torch.equal(module.layers[0].weight, before)
    saved = load_checkpoint(list_checkpoints(tmp_path)[-1])
    assert set(saved.model) == {"layers.3.weight", "layers.3.bias"}
    assert json.loads((tmp_path / "step-00000002" / "state.json").read_text())["step"] == 2
