"""Steps that are left out: which, with what in their place, and how far the result then is from the whole."""

import accelerate
import numpy as np
import pytest
import torch
from accelerate.hooks import remove_hook_from_module

from stableavatar.pipeline import AvatarPipeline
from stableavatar.sampling.denoiser import Schedule
from stableavatar.sampling.orders import Cell
from stableavatar.sampling.step_cache import StepCache, steps_to_run
from stableavatar.training.tiny.assemble import SAMPLING_DEFAULTS
from toy import toy_pipeline, toy_transformer

SAMPLES = np.random.default_rng(0).standard_normal(70 * 640).astype(np.float32)
POLYNOMIAL = (0.1, 0.0)  # a tenth of the change: the toy model's embeddings move far from step to step
PICTURE = np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pipeline() -> AvatarPipeline:
    """The toy model."""
    made = toy_pipeline()
    object.__setattr__(made.defaults, "step_cache_coefficients", POLYNOMIAL)
    return made


def frames(pipeline: AvatarPipeline, **options: object) -> np.ndarray:
    settings = {"steps": 10, "seed": 3, "width": 32, "height": 32, **options}
    return np.stack(list(pipeline.stream(PICTURE, SAMPLES, **settings))).astype(float)


def test_a_step_runs_when_the_changes_since_the_last_have_come_to_the_threshold() -> None:
    values = torch.tensor([[1.0], [1.1], [1.21], [1.331], [1.4641], [1.5]])
    assert steps_to_run(values, 0.15, (1.0, 0.0)) == (True, False, True, False, True, True)
    assert steps_to_run(values, 0.15, (2.0, 0.0)) == (True, True, True, True, True, True)
    assert steps_to_run(values, 9.0, (1.0, 0.0)) == (True, False, False, False, False, True)
    assert steps_to_run(values, 0.0, (1.0, 0.0)) == (True,) * 6


def test_without_a_threshold_nothing_changes(pipeline: AvatarPipeline) -> None:
    assert np.array_equal(frames(pipeline, step_cache=1e-9), frames(pipeline))


def counted(pipeline: AvatarPipeline, **options: object) -> tuple[np.ndarray, int]:
    """The frames, and how many rows went through the first block."""
    rows: list[int] = []
    hook = pipeline.transformer.blocks[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        return frames(pipeline, **options), sum(rows)
    finally:
        hook.remove()


def cache(pipeline: AvatarPipeline, threshold: float) -> StepCache:
    timesteps = Schedule.from_scheduler(pipeline.scheduler, 10).timesteps
    return StepCache(pipeline.transformer, timesteps, threshold, POLYNOMIAL)


def threshold_for(pipeline: AvatarPipeline, share: float) -> float:
    """A threshold at which about so many of ten steps run."""
    return next(t for t in np.geomspace(1e-4, 1, 200) if sum(cache(pipeline, t).runs) <= share * 10)


@pytest.mark.parametrize("options", [{}, {"order": "lockstep"}, {"batch_windows": 3}, {"order": "causal"}])
def test_fewer_rows_run_and_the_error_is_bounded(
    pipeline: AvatarPipeline, options: dict[str, object]
) -> None:
    whole, every = counted(pipeline, **options)
    threshold = threshold_for(pipeline, 0.6)
    ours, some = counted(pipeline, step_cache=threshold, **options)
    assert some == every * sum(cache(pipeline, threshold).runs) // 10
    error = np.abs(ours - whole).mean()
    assert 0 < error < 2
    more = np.abs(frames(pipeline, step_cache=threshold_for(pipeline, 0.2), **options) - whole).mean()
    assert error < more


def test_orders_agree(pipeline: AvatarPipeline) -> None:
    threshold = threshold_for(pipeline, 0.5)
    wavefront, lockstep = (
        frames(pipeline, step_cache=threshold, order=order) for order in ("wavefront", "lockstep")
    )
    assert np.array_equal(wavefront, lockstep)


def test_one_state_for_all_windows_is_noise(
    pipeline: AvatarPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the published code does: a window adds what another's blocks have added."""
    threshold = threshold_for(pipeline, 0.6)
    whole = frames(pipeline, order="lockstep")
    own = np.abs(frames(pipeline, order="lockstep", step_cache=threshold) - whole).mean()
    residual, keep = StepCache.residual, StepCache.keep

    def one(cells: list[Cell]) -> list[Cell]:
        return [Cell(cell.window.__class__(0, 0, 5, 0), cell.step) for cell in cells]

    def keep_one(self: StepCache, cells: list[Cell], value: object) -> None:
        if cells[0].step < len(self.runs) - 1:
            keep(self, one(cells), value)

    monkeypatch.setattr(StepCache, "residual", lambda self, cells: residual(self, one(cells)))
    monkeypatch.setattr(StepCache, "keep", keep_one)
    shared = np.abs(frames(pipeline, order="lockstep", step_cache=threshold) - whole).mean()
    assert shared > 3 * own


def test_nothing_is_kept_of_windows_that_are_done(
    pipeline: AvatarPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    keep = StepCache.keep

    def count(self: StepCache, cells: list[Cell], value: object) -> None:
        keep(self, cells, value)
        kept.append(len(self._residuals))

    monkeypatch.setattr(StepCache, "keep", count)
    frames(pipeline, step_cache=threshold_for(pipeline, 0.6), order="causal")
    assert max(kept) == 1
    assert kept[-1] == 0


def test_weights_that_come_piece_by_piece(pipeline: AvatarPipeline) -> None:
    """diffusers' sequential offloading: they lie nowhere until their layer computes."""
    threshold = threshold_for(pipeline, 0.6)
    whole = frames(pipeline, step_cache=threshold)
    accelerate.cpu_offload(pipeline.transformer, torch.device("cpu"))
    try:
        assert pipeline.transformer.device.type == "meta"
        assert np.array_equal(frames(pipeline, step_cache=threshold), whole)
    finally:
        remove_hook_from_module(pipeline.transformer, recurse=True)


def test_weights_that_come_at_the_first_call() -> None:
    """diffusers' model offloading: until then they lie on the CPU, whatever the device."""
    transformer = toy_transformer()
    timesteps = torch.tensor([900.0, 500.0, 100.0])
    expected = StepCache(transformer, timesteps, 0.1, [1.0, 0.0]).runs
    assert StepCache(transformer, timesteps, 0.1, [1.0, 0.0], torch.device("lazy:0")).runs == expected


def test_tiny_has_its_own_polynomial() -> None:
    assert SAMPLING_DEFAULTS["step_cache_coefficients"] == (1.0, 0.0)
    tiny = AvatarPipeline.from_pretrained("tiny")
    assert tiny.defaults.step_cache_coefficients == (1.0, 0.0)
    assert toy_pipeline().defaults.step_cache_coefficients[0] == -5.21862437e4
