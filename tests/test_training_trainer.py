"""The trainer: exact resuming, atomic checkpoints, bad steps, the log, what is trained."""

import json
import math
import multiprocessing
import random
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stableavatar.errors import CheckpointError, InputError
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.training.checkpoints import (
    TrainingState,
    list_checkpoints,
    load_checkpoint,
    random_state,
    save_checkpoint,
)
from stableavatar.training.ema import MovingAverage
from stableavatar.training.log import read_log
from stableavatar.training.objective import StepLoss
from stableavatar.training.optimizers import ClipSettings, OptimizerSettings, clip_gradients
from stableavatar.training.parameters import freeze_others, trained_by_recipe, trained_parameters
from stableavatar.training.settings import TrainerSettings
from stableavatar.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

SAMPLES = 7


class Points:
    """Samples of two sizes, each telling which clip in which pass it is."""

    groups = ("small", "large", "small", "small", "large", "small", "large")
    fingerprint = "seven points"

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        index, epoch = key
        width = 2 if self.groups[index] == "small" else 3
        return torch.full((width,), float(index) / SAMPLES + 0.01 * epoch)


class Fit(nn.Module):
    """A small network whose loss uses the step's generator and, by its dropout, the global one."""

    def __init__(self, poison: tuple[int, ...] = (), kind: str = "nan") -> None:
        super().__init__()
        self.kind = kind
        torch.manual_seed(5)
        self.layers = nn.Sequential(nn.Linear(1, 6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 1))
        self.poison = poison
        self.calls = 0

    def forward(self, batch: torch.Tensor, generator: torch.Generator) -> StepLoss:
        self.calls += 1
        sigma = torch.rand(len(batch), generator=generator)
        wanted = torch.sin(5 * batch.mean(1)) + sigma
        error = (self.layers(batch.mean(1, keepdim=True))[:, 0] - wanted) ** 2
        if self.calls in self.poison:
            zero = error - error.detach()
            error = {
                "nan": error * math.nan,
                "infinite loss, finite gradient": error + math.inf,
                "finite loss, infinite gradient": error.detach() + zero.sqrt(),
            }[self.kind]
        return StepLoss(error.mean(), error.detach(), sigma)


class Wide(Fit):
    """With matrices that are large enough for an optimizer of 8 bits, and named as blocks are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 256), nn.Tanh(), nn.Linear(256, 256), nn.Linear(256, 1))


def settings(**values: Any) -> TrainerSettings:
    """`values` may hold fields of the trainer, of the optimizer and of the clipping."""
    usual = {
        "steps": 12, "batch_size": 2, "accumulation": 2, "learning_rate": 1e-2, "norm": 1.0, "start_ratio": 1.0,
        "start_steps": 0, "abnormal_ratio": None, "warmup_steps": 4, "ema_decay": 0.9, "precision": "no",
        "checkpoint_every": 5, "log_every": 3, "seed": 11,
    }  # fmt: skip
    values = {**usual, **values}

    def taken(kind: type[Any]) -> dict[str, Any]:
        return {field.name: values.pop(field.name) for field in fields(kind) if field.name in values}

    clip = ClipSettings(**taken(ClipSettings))
    return TrainerSettings(optimizer=OptimizerSettings(clip=clip, **taken(OptimizerSettings)), **values)


def make(folder: Path, module: nn.Module | None = None, **values: Any) -> Trainer[torch.Tensor]:
    return Trainer(module or Fit(), Points(), torch.stack, settings(**values), folder)


def final(folder: Path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(list_checkpoints(folder)[-1])
    assert state.ema is not None
    moments = {f"adam.{k}.{n}": v for k, s in state.optimizer["state"].items() for n, v in s.items()}
    return {**state.model, **{f"ema.{k}": v for k, v in state.ema.items()}, **moments}


def losses(folder: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name != "clips_per_second"}
        for line in read_log(folder / "log.jsonl")
    ]


def assert_same_run(one: Path, other: Path) -> None:
    a, b = final(one), final(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert losses(one) == losses(other)


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


def state(value: float) -> TrainingState:
    return TrainingState({"w": torch.tensor([value])}, None, {}, random_state(), {"step": int(value)})


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, state(1.0), keep=2)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(CheckpointError, match="No space left"):
            save_checkpoint(tmp_path, 2, state(2.0), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    for step in (2, 3, 4):
        save_checkpoint(tmp_path, step, state(float(step)), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    assert load_checkpoint(tmp_path / "step-00000004").model["w"].item() == 4


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, state(1.0), keep=1)
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
    assert trainer.train().skipped_steps == 1
    assert all(torch.equal(before[name], value) for name, value in trainer.parameters.items())


def test_a_step_is_adamw_on_the_mean_of_its_micro_steps(tmp_path: Path) -> None:
    """One optimizer step against PyTorch's AdamW on the average gradient, clipped, at the warm-up's first
    rate.
    """
    trainer = make(tmp_path, steps=1, ema_decay=0.0, norm=0.01)
    reference = Fit()
    torch.manual_seed(42)
    trainer.train()

    torch.manual_seed(42)
    trainer.step = 0
    pieces = trainer.sampler.step(0)
    for micro_step, keys in enumerate(pieces):
        batch = torch.stack([Points()[key] for key in keys])
        share = len(keys) / sum(map(len, pieces))
        (reference(batch, trainer._generator(micro_step)).loss * share).backward()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2 / 4, weight_decay=3e-2, eps=1e-10)
    nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
    optimizer.step()
    for name, value in reference.named_parameters():
        torch.testing.assert_close(trainer.parameters[name], value, rtol=1e-6, atol=1e-7)


def test_warm_up_then_constant(tmp_path: Path) -> None:
    make(tmp_path, steps=6, log_every=1).train()
    rates = [line["learning_rate"] for line in losses(tmp_path)]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_the_rate_falls_over_the_last_steps(tmp_path: Path) -> None:
    make(tmp_path, steps=8, log_every=1, schedule="linear", decay_steps=3).train()
    rates = [line["learning_rate"] for line in losses(tmp_path)]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.0075, 0.005, 0.0025])


def test_the_rate_falls_over_all_that_follows_the_warm_up() -> None:
    linear = OptimizerSettings(learning_rate=1.0, warmup_steps=2, schedule="linear")
    assert [linear.rate(step, 6) for step in range(6)] == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2])
    cosine = replace(linear, schedule="cosine")
    wanted = [(1 - math.cos(math.pi * left)) / 2 for left in (0.8, 0.6, 0.4, 0.2)]
    assert [cosine.rate(step, 6) for step in range(2, 6)] == pytest.approx(wanted)


@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit", "muon"])
def test_every_optimizer_trains_and_goes_on_exactly(tmp_path: Path, kind: str) -> None:
    if kind == "adamw-8bit":
        pytest.importorskip("torchao", reason="in the extra large; see make test-large")
    make(tmp_path / "whole", Wide(), kind=kind, steps=4).train()
    make(tmp_path / "parts", Wide(), kind=kind, steps=2).train()
    rest = make(tmp_path / "parts", Wide(), kind=kind, steps=4)
    rest.resume("latest")
    rest.train()
    whole, parts = (load_checkpoint(list_checkpoints(tmp_path / name)[-1]) for name in ("whole", "parts"))
    start = dict(Wide().named_parameters())
    for name, value in whole.model.items():
        assert torch.equal(value, parts.model[name]), name
        assert not torch.equal(value, start[name]), name


def test_a_resumed_optimizer_obeys_the_settings(tmp_path: Path) -> None:
    make(tmp_path, steps=1).train()
    rest = make(tmp_path, weight_decay=0.25, epsilon=1e-5, betas=(0.5, 0.6))
    rest.resume("latest")
    (group,) = rest.optimizer.param_groups
    assert (group["weight_decay"], group["eps"], group["betas"]) == (0.25, 1e-5, (0.5, 0.6))


def test_eight_bits_take_a_quarter_of_the_memory(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="in the extra large; see make test-large")
    sizes = {}
    for kind in ("adamw", "adamw-8bit"):
        make(tmp_path / kind, Wide(), kind=kind, steps=1).train()
        sizes[kind] = (list_checkpoints(tmp_path / kind)[-1] / "optimizer.pt").stat().st_size
    assert sizes["adamw-8bit"] < 0.3 * sizes["adamw"]


class TestClipping:
    def test_the_limit_starts_high_and_falls(self) -> None:
        clip = ClipSettings(norm=0.1, start_ratio=5.0, start_steps=10)
        assert [clip.limit(step, 1.0) for step in (0, 5)] == pytest.approx([0.5, 0.3])

    def test_an_abnormal_norm_lowers_it(self) -> None:
        clip = ClipSettings(norm=0.1, start_steps=10, abnormal_ratio=5.0)
        assert [clip.limit(10, norm) for norm in (0.4, 0.8, 100.0)] == pytest.approx([0.1, 0.0125, 0.01])
        assert replace(clip, abnormal_ratio=None).limit(10, 100.0) == 0.1

    def test_gradients_are_cut_to_it(self) -> None:
        weights = {name: nn.Parameter(torch.zeros(2)) for name in "abc"}
        weights["a"].grad, weights["b"].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
        clip = ClipSettings(norm=1.0, start_steps=0, abnormal_ratio=None)
        assert clip_gradients(weights, clip, 0) == 5
        torch.testing.assert_close(weights["a"].grad, torch.tensor([0.6, 0.0]))
        assert clip_gradients(weights, replace(clip, norm=2.0), 0) == pytest.approx(1.0)
        torch.testing.assert_close(weights["b"].grad, torch.tensor([0.0, 0.8]))


def test_trackers_get_the_log(tmp_path: Path) -> None:
    trainer = make(tmp_path, steps=6, trackers=("tensorboard",))
    trainer.train()
    trainer.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "trackers" / "stableavatar")).Reload()
    drawn = [(event.step, event.value) for event in events.Scalars("loss")]
    assert drawn == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in losses(tmp_path)]


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
