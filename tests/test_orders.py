"""The sampler's orders: the published rule, and the same latents in another order, with less of them in
memory."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plans import NOISE, drift, plans, upstream_plans, weights
from stableavatar.sampling.engine import Sampler, SamplingError, one_by_one, sample_all
from stableavatar.sampling.orders import ORDERS, Cell
from stableavatar.sampling.trajectory import Piece, Trajectory
from stableavatar.sampling.windows import GrowingPlan, Plan, WindowPlan, overlap_ramp, plan_windows


def made(plan: Plan, steps: int, **options: object) -> torch.Tensor:
    return sample_all(plan, steps, NOISE, one_by_one(drift), **options)


def by_the_letter(plan: WindowPlan, steps: int, ramp: list[float]) -> torch.Tensor:
    """The rule of the specification, latent by latent, with the written windows of a step kept apart."""
    versions = [NOISE.frames(0, plan.latent_frames)]
    for step in range(steps):
        after = versions[-1].clone()
        results = [drift(Cell(w, step), versions[-1][:, w.start : w.stop]) for w in plan.windows]
        for window, result in zip(plan.windows, results, strict=True):
            for latent in range(window.write_start, window.stop):
                new = result[:, latent - window.start]
                j = latent - window.write_start
                if step > 0 and window.index > 0 and j < plan.overlap:
                    new = new * ramp[j] + after[:, latent] * (1 - ramp[j])
                if plan.compat == "upstream":
                    new = new.bfloat16().float()
                after[:, latent] = new
        versions.append(after)
    return versions[-1]


@settings(max_examples=40, deadline=None)
@given(plans, st.integers(1, 4), weights)
def test_lockstep_is_the_rule_by_the_letter(plan: WindowPlan, steps: int, weights: str) -> None:
    ours = made(plan, steps, order="lockstep", weights=weights)
    expected = by_the_letter(plan, steps, overlap_ramp(plan.overlap, weights).tolist())
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


def test_upstream_rounds_to_bfloat16() -> None:
    plan = plan_windows(30, 13, 4, compat="upstream")
    ours = made(plan, 3)
    assert torch.equal(ours, ours.bfloat16().float())
    torch.testing.assert_close(
        ours, by_the_letter(plan, 3, overlap_ramp(4, "uniform").tolist()), atol=0.02, rtol=0
    )
    assert not torch.equal(made(plan_windows(30, 13, 4), 3), ours)


@settings(max_examples=150, deadline=None)
@given(st.one_of(plans, upstream_plans), st.integers(1, 6), weights)
def test_wavefront_is_lockstep_to_the_bit(plan: WindowPlan, steps: int, weights: str) -> None:
    expected = made(plan, steps, order="lockstep", weights=weights)
    assert torch.equal(made(plan, steps, order="wavefront", weights=weights), expected)


@pytest.mark.parametrize("order", ["wavefront", "lockstep", "causal"])
@settings(max_examples=80, deadline=None)
@given(plan=st.one_of(plans, upstream_plans), steps=st.integers(1, 6), batch=st.integers(2, 5))
def test_batches_change_nothing(order: str, plan: WindowPlan, steps: int, batch: int) -> None:
    sizes = []

    def denoise(cells: list[Cell], latents: list[torch.Tensor]) -> list[torch.Tensor]:
        sizes.append(len(cells))
        return [drift(cell, before) for cell, before in zip(cells, latents, strict=True)]

    ours = sample_all(plan, steps, NOISE, denoise, order=order, batch_windows=batch)
    assert torch.equal(ours, made(plan, steps, order=order if order == "causal" else "lockstep"))
    assert max(sizes) <= batch
    assert sum(sizes) == steps * len(plan)
    if len(plan) > (plan.reach + 1) * 2 and steps > 1:
        assert max(sizes) > 1


@given(st.integers(3, 21).flatmap(lambda f: st.tuples(st.just(f), st.integers(2, f - 1))), st.integers(1, 6))
def test_causal_of_a_single_window_is_lockstep(sizes: tuple[int, int], steps: int) -> None:
    plan = plan_windows(1, *sizes)
    assert torch.equal(made(plan, steps, order="causal"), made(plan, steps, order="lockstep"))


@settings(max_examples=60, deadline=None)
@given(plans, st.integers(2, 5))
def test_causal_hears_from_predecessors_alone(plan: WindowPlan, steps: int) -> None:
    """The latents that the first windows write do not depend on what follows."""
    whole = made(plan, steps, order="causal")
    for window in plan.windows[:-1]:
        final = window.stop - plan.overlap
        shorter = plan_windows(window.stop, plan.window_latents, plan.overlap)
        assert torch.equal(made(shorter, steps, order="causal")[:, :final], whole[:, :final])
    if len(plan) > 1:
        assert not torch.equal(whole, made(plan, steps))


@settings(max_examples=80, deadline=None)
@given(plans, st.integers(1, 5), st.sampled_from(["wavefront", "causal"]))
def test_a_length_that_is_not_known_changes_nothing(plan: WindowPlan, steps: int, order: str) -> None:
    asked: list[int] = []

    def length(latents: int) -> int | None:
        asked.append(latents)
        return None if latents <= plan.latent_frames else plan.latent_frames

    growing = GrowingPlan(plan.window_latents, plan.overlap, length)
    assert torch.equal(made(growing, steps, order=order), made(plan, steps, order=order))
    assert asked == sorted(set(asked))  # speech is waited for once, and in order


def test_causal_waits_for_no_more_speech_than_it_gives_out() -> None:
    """A window's latents come before the speech of the next window is asked for."""
    asked: list[int] = []

    def length(latents: int) -> int | None:
        asked.append(latents)
        return None if latents <= 60 else 60

    parts = iter(Sampler(GrowingPlan(9, 3, length), 4, NOISE, one_by_one(drift), order="causal"))
    assert next(parts).shape[1] == 6
    assert asked == [9]
    assert next(parts).shape[1] == 6
    assert asked == [9, 15]


@settings(max_examples=60, deadline=None)
@given(plans, st.integers(1, 6), st.sampled_from(sorted(ORDERS)), st.integers(1, 7))
def test_every_cell_runs_once_and_after_what_it_needs(
    plan: WindowPlan, steps: int, order: str, at_once: int
) -> None:
    done: set[tuple[int, int]] = set()
    for batch in ORDERS[order](plan, steps, at_once):
        for window, step in batch:
            last = window.index if order == "causal" else min(window.index + plan.reach, len(plan) - 1)
            assert step == 0 or all((heard, step - 1) in done for heard in range(window.index, last + 1))
        done |= {(window.index, step) for window, step in batch}
    assert done == {(window, step) for window in range(len(plan)) for step in range(steps)}


def cells_until(plan: Plan, steps: int, order: str) -> int:
    """Cells that run before the first latents are final."""
    counter = itertools.count(1)
    last = 0

    def count(_cell: Cell) -> None:
        nonlocal last
        last = next(counter)

    next(iter(Sampler(plan, steps, NOISE, one_by_one(drift), order=order, progress=count)))
    return last


@pytest.mark.parametrize("steps", [4, 10])
def test_the_first_latents_come_early(steps: int) -> None:
    for windows in (40, 80):
        plan = plan_windows(3 + 6 * windows, 9, 3)
        assert len(plan) == windows
        assert cells_until(plan, steps, "causal") == steps
        assert cells_until(plan, steps, "wavefront") == steps * (steps + 1) // 2
        assert cells_until(plan, steps, "lockstep") == windows * (steps - 1) + 1


def alive(plan: Plan, steps: int, batches: Iterator[list[Cell]]) -> int:
    """The most latent frames that are in memory after a cell."""
    trajectory = Trajectory(plan, steps, NOISE)
    most = 0
    for batch in batches:
        before = [trajectory.before(cell) for cell in batch]
        for cell, latents in zip(batch, before, strict=True):
            trajectory.write(cell, drift(cell, latents))
            trajectory.mark(cell)
        for _ in trajectory.finished():
            pass
        most = max(most, sum(piece.latents.shape[1] for video in trajectory.videos for piece in video))
    return most


@pytest.mark.parametrize("overlap", [3, 5, 7])
def test_memory_does_not_grow_with_length(overlap: int) -> None:
    steps = 5
    for order, at_once in itertools.product(("wavefront", "causal"), (1, 3)):
        short, long = (
            alive(plan, steps, ORDERS[order](plan, steps, at_once))
            for plan in (plan_windows(9 + (9 - overlap) * windows, 9, overlap) for windows in (30, 150))
        )
        assert short == long
        assert long <= 9 * 4 * steps
    plan = plan_windows(300, 9, overlap)
    assert alive(plan, steps, ORDERS["lockstep"](plan, steps, 1)) >= 300


def test_what_a_cell_looks_at_does_not_grow_with_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """In lockstep all windows' pieces of a step are there; only those at the end matter to the next."""
    looked = 0
    stop = Piece.stop

    def count(self: Piece) -> int:
        nonlocal looked
        looked += 1
        return stop.fget(self)

    monkeypatch.setattr(Piece, "stop", property(count))
    counts = []
    for windows in (20, 200):
        looked = 0
        plan = plan_windows(9 + 6 * (windows - 1), 9, 3)
        assert plan.count == windows
        made(plan, 3, order="lockstep")
        counts.append(looked / windows)
    assert counts[1] < counts[0] * 1.2


def test_finished_latents_are_given_out_once_and_in_order() -> None:
    plan = plan_windows(100, 9, 3)
    parts = list(Sampler(plan, 3, NOISE, one_by_one(drift)))
    assert [part.shape[1] for part in parts[:-2]] == [6] * (len(parts) - 2)
    assert torch.equal(torch.cat(parts, dim=1), made(plan, 3, order="lockstep"))


def test_a_cell_that_comes_too_early_is_refused() -> None:
    plan = plan_windows(30, 9, 3)
    trajectory = Trajectory(plan, 2, NOISE)
    first, second = plan.windows[:2]
    with pytest.raises(LookupError, match="before step 0 has made them"):
        trajectory.before(Cell(first, 1))
    with pytest.raises(LookupError, match="before its predecessor"):
        trajectory.write(Cell(second, 1), NOISE.frames(second.start, second.stop))
    with pytest.raises(LookupError, match="before its predecessor"):
        trajectory.mark(Cell(second, 0))


def test_the_beginning_does_not_depend_on_the_first_steps_of_a_longer_video() -> None:
    short, long = (made(plan_windows(n, 9, 3), 1) for n in (21, 33))
    assert torch.equal(short[:, :18], long[:, :18])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("order", sorted(ORDERS))
def test_latents_that_are_no_numbers_stop_the_run(bad: float, order: str) -> None:
    def cell(cell: Cell, latents: torch.Tensor) -> torch.Tensor:
        return latents * (bad if (cell.window.index, cell.step) == (1, 2) else 1)

    with pytest.raises(SamplingError, match="step 3 of 4 in window 2"):
        sample_all(plan_windows(37, 21, 5), 4, NOISE, one_by_one(cell), order=order)


def test_progress_counts_every_cell() -> None:
    seen: list[tuple[int, int]] = []
    made(plan_windows(37, 21, 5), 2, progress=lambda cell: seen.append((cell.step, cell.window.index)))
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]
