"""One video being made: conditions, then cells and frames in turn."""

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch

from stableavatar import __version__
from stableavatar.conditioning.image import portrait_embeddings, reference_condition
from stableavatar.conditioning.speech import WindowSpeech
from stableavatar.conditioning.text import encode_prompts
from stableavatar.errors import InputError, SamplingError, StoppedError
from stableavatar.journal import (
    SavedState,
    config_hash,
    differences,
    json_hash,
    speech_hash,
    tensor_hash,
    weights_fingerprint,
)
from stableavatar.media.audio import SPEECH_RATE, Speech
from stableavatar.media.live import LiveSpeech
from stableavatar.media.reading import Frame
from stableavatar.media.timing import frame_count
from stableavatar.options import Settings
from stableavatar.placement.autoencoder import bring_autoencoder, decoder_device
from stableavatar.placement.processes import Processes
from stableavatar.sampling.decoding import StreamDecoder
from stableavatar.sampling.denoiser import Conditions, Denoiser, Schedule
from stableavatar.sampling.engine import Sampler
from stableavatar.sampling.guidance import GUIDANCE_RULES
from stableavatar.sampling.noise import GivenNoise, Noise
from stableavatar.sampling.orders import Cell
from stableavatar.sampling.sharing import SharedWindows, Stopwatch, Wish
from stableavatar.sampling.step_cache import StepCache
from stableavatar.sampling.windows import Plan, Window

if TYPE_CHECKING:
    from stableavatar.pipeline import AvatarPipeline


@dataclass(frozen=True)
class Progress:
    """How far a video is; what is not known, since speech is still arriving, is None.

    Attributes:
        step: of the cell that was sampled last, counted from 1; 0 before the first.
        steps: how many there are of each window.
        window: of that cell, counted from 1; 0 before the first.
        windows: how many there are.
        frame: how many are decoded.
        frames: of the whole video.
        share: of the work, 0 to 1.
        seconds_left: from the pace of cells and of frames so far.
    """

    step: int
    steps: int
    window: int
    windows: int | None
    frame: int
    frames: int | None
    share: float | None
    seconds_left: float | None


ProgressCallback = Callable[[Progress], None]


class Keeper(Protocol):
    """Who takes a run's frames, and may want its state."""

    def wish(self) -> Wish:
        """Asked when cells have run: what is to happen when their frames have been taken?"""
        ...

    def reached(self, state: SavedState | None) -> None:
        """Those frames have been taken; the state, where it was wished. Raises what a stop is to raise."""
        ...


@dataclass(frozen=True)
class Run:
    """One video being made.

    Attributes:
        pipeline: whose parts are used.
        options: with every default filled in.
        plan: the windows. frame_count: frames of the video, at `frame_rate` frames a second; None while its
            speech is arriving.
        picture: the fitted portrait, float32 `[3, height, width]` in [-1, 1].
        speech: closed when the run ends; None for a video without speech.
        noise: what the latents start from.
        progress: called after every cell and every frame.
        processes: which share the windows; only the first has frames.
    """

    pipeline: "AvatarPipeline"
    options: Settings
    plan: Plan
    frame_count: int | None
    frame_rate: Fraction
    picture: torch.Tensor
    speech: Speech | LiveSpeech | None
    noise: Noise
    progress: ProgressCallback | None
    processes: Processes | None = None

    def frames(
        self, keeper: Keeper | None = None, saved: SavedState | None = None
    ) -> Generator[Frame, None, None]:
        """The video's frames, uint8 `[height, width, 3]`, each as soon as the order makes its latents final.

        Args:
            keeper: asked between cells whether to save the state, or to stop.
            saved: what to go on from, in place of the beginning.

        Raises:
            SamplingError: latents or a frame became NaN or infinite.
            ProcessError: another process was lost, or has ended.
            InputError: another process has other inputs or weights.
            StoppedError: the first process was asked to stop.
        """
        try:
            yield from self._frames(keeper, saved)
        except BaseException as error:
            if self.processes is not None and not isinstance(error, StoppedError):
                self.processes.fail(str(error) or "no more frames are taken")
            raise
        finally:
            self.close()
            self.pipeline.maybe_free_model_hooks()

    def latents(self) -> Generator[torch.Tensor, None, None]:
        """The video's latents, normalised, `[C, n, height/8, width/8]`, as the order makes them final;
        nothing is decoded.

        Raises:
            SamplingError: latents became NaN or infinite.
        """
        try:
            pace = _Pace()
            sampler = self._parts(pace, None, decode=False).sampler
            pace.begin()
            yield from sampler
        finally:
            self.close()
            self.pipeline.maybe_free_model_hooks()

    def close(self) -> None:
        """Let go of the recording; `frames` does so at its end."""
        if self.speech is not None:
            self.speech.close()

    @cached_property
    def inputs(self) -> Mapping[str, Any]:
        """Hashes of what a run is made of beside its settings: portrait, speech, noise and model."""
        assert not isinstance(self.speech, LiveSpeech)
        modules = {
            name: part for name, part in self.pipeline.components.items() if isinstance(part, torch.nn.Module)
        }
        return {
            "portrait": tensor_hash(self.picture),
            "speech": speech_hash(self.speech),
            "noise": tensor_hash(self.noise.latents) if isinstance(self.noise, GivenNoise) else None,
            "weights": weights_fingerprint(modules),
            "model's configuration": config_hash(modules),
            "tokens of the prompts": json_hash(self._tokens()),
            "scheduler": {
                name: str(value)
                for name, value in self.pipeline.scheduler.config.items()
                if not name.startswith("_")  # of the library, and not the same in every process
            },
            "step cache's coefficients": list(self.pipeline.defaults.step_cache_coefficients),
        }

    def _tokens(self) -> list[list[int]]:
        """What the tokenizer makes of the prompts."""
        prompts = [self.options.prompt, self.options.negative_prompt]
        length = self.pipeline.transformer.config.text_length
        return list(self.pipeline.tokenizer(prompts, truncation=True, max_length=length)["input_ids"])

    def _frames(self, keeper: Keeper | None, saved: SavedState | None) -> Iterator[Frame]:
        if self.processes is not None:
            saved = self._agree(self.processes, saved)
        pace = _Pace()
        parts = self._parts(pace, keeper)
        if saved is not None:
            parts.restore(saved)
            pace.go_on(parts.sampler.cells, parts.frames)
        pace.begin()
        for part in parts.sampler:
            assert parts.decoder is not None
            for latent in part.unbind(1):
                if parts.frames == self._total():
                    break  # a window may be longer than what is left
                for frame in parts.decoder.decode(latent):
                    if parts.frames == self._total():
                        break
                    parts.frames += 1
                    pixels = finite_pixels(frame, parts.frames)
                    pace.frame()
                    self._report(pace)
                    yield pixels

    def _total(self) -> int | None:
        """Frames of the video, None while its speech is arriving."""
        if isinstance(self.speech, LiveSpeech) and self.speech.length is not None:
            return frame_count(self.speech.length, SPEECH_RATE, self.frame_rate)
        return self.frame_count

    def _agree(self, processes: Processes, saved: SavedState | None) -> SavedState | None:
        """See to it that all processes make the same video; what they go on from, which the first has."""
        settings = {"version": __version__, "dtype": str(self.pipeline.transformer.dtype)}
        each = processes.gather({"settings": settings, **self.inputs})
        refusal = None
        for rank, theirs in enumerate(each or []):
            different = differences(each[0], theirs) if each else []
            if different:
                refusal = f"process {rank} of {processes.size} has others: {'; '.join(different)}"
                break
        told = None
        if saved is not None:  # the decoder's memory, which is large, is the first process's alone
            tensors = {name: it for name, it in saved.tensors.items() if not name.startswith("decoder.")}
            told = SavedState(tensors, saved.rest)
        refusal, told = processes.broadcast((refusal, told))
        if refusal is not None:
            raise InputError(f"{refusal}. All processes need the same files and the same release.")
        return saved if processes.leads else told

    def _state(self, parts: "RunParts") -> SavedState | None:
        """What to go on from, put together of all processes in the first."""
        own = parts.state()
        if self.processes is None:
            return own
        mine = own.tensors
        if not self.processes.leads:  # a part of a tensor would take all of it along
            mine = {name: tensor.cpu().clone() for name, tensor in mine.items()}
        each = self.processes.gather(mine)
        if each is None:
            return None
        return SavedState({name: tensor for tensors in each for name, tensor in tensors.items()}, own.rest)

    def _conditions(self) -> Conditions:
        pipeline, options = self.pipeline, self.options
        device = pipeline._execution_device
        prompts, own = [options.prompt, options.negative_prompt], [pipeline.defaults.negative_prompt]
        text_length = pipeline.transformer.config.text_length
        prompt, negative = encode_prompts(
            pipeline.tokenizer,
            pipeline.text_encoder,
            prompts,
            text_length,
            device,
            quiet=own if self.processes is None or self.processes.leads else prompts,
        )
        portrait = portrait_embeddings(pipeline.image_encoder, self.picture.to(device))
        bring_autoencoder(pipeline.vae, self._decoder_device)
        reference = reference_condition(pipeline.vae, self.picture.to(self._decoder_device), options.window)
        return Conditions(prompt[None], negative[None], portrait, reference.to(device))

    @property
    def _decoder_device(self) -> torch.device:
        chosen = decoder_device(self.pipeline.vae, self.options.decoder_device)
        return chosen or self.pipeline._execution_device

    def _parts(self, pace: "_Pace", keeper: Keeper | None, *, decode: bool = True) -> "RunParts":
        pipeline, options = self.pipeline, self.options
        device = pipeline._execution_device
        conditions = self._conditions()
        rule = GUIDANCE_RULES[options.guidance]
        guidance = rule(options.text_scale, options.audio_scale, has_audio=self.speech is not None)
        schedule = Schedule.from_scheduler(pipeline.scheduler, options.steps)
        speech = None
        if self.speech is not None:
            speech = WindowSpeech(
                pipeline.speech_encoder,
                self.speech,
                self.plan,
                self.frame_rate,
                normalisation=options.speech_normalisation,
                device=device,
            )
        step_cache = None
        if options.step_cache > 0:
            coefficients = pipeline.defaults.step_cache_coefficients
            step_cache = StepCache(
                pipeline.transformer, schedule.timesteps, options.step_cache, coefficients, device
            )
        denoiser = Denoiser(
            pipeline.transformer,
            schedule,
            guidance,
            conditions,
            speech or _no_speech,
            window_latents=self.plan.window_latents,
            no_audio=options.no_audio,
            step_cache=step_cache,
            device=device,
        )

        def ran(cell: Cell) -> None:
            if speech is not None and cell.step == len(schedule) - 1:
                speech.release(cell.window)
            pace.cell(cell)
            self._report(pace)

        def boundary(wish: Wish) -> None:
            state = None if wish == Wish.GO_ON else self._state(parts)
            if keeper is not None:
                keeper.reached(state)
            elif wish == Wish.STOP:
                raise StoppedError("Interrupted.")

        sharing = None
        if self.processes is not None:
            sharing = SharedWindows(self.processes, self.plan, len(schedule), options.order)
        sampler = Sampler(
            self.plan,
            len(schedule),
            self.noise,
            denoiser,
            order=options.order,
            batch_windows=options.batch_windows,
            weights=options.overlap_weights,
            device=device,
            progress=ran,
            sharing=sharing,
            wish=keeper.wish if keeper is not None else lambda: Wish.GO_ON,
            boundary=boundary,
        )
        decoder = None
        if sampler.sharing.leads and decode:
            decoder = StreamDecoder(pipeline.vae, self._decoder_device, tiling=options.decoder_tiling)
        parts = RunParts(sampler, decoder, step_cache)
        return parts

    def _report(self, pace: "_Pace") -> None:
        if self.progress is None:
            return
        windows, frames = self.plan.count, self._total()
        cells = None if windows is None else windows * self.options.steps
        self.progress(
            Progress(
                step=pace.last.step + 1 if pace.last else 0,
                steps=self.options.steps,
                window=pace.last.window.index + 1 if pace.last else 0,
                windows=windows,
                frame=pace.frames_done,
                frames=frames,
                share=pace.share(cells, frames),
                seconds_left=pace.seconds_left(cells, frames),
            )
        )


@dataclass
class RunParts:
    """The parts of a run that have a state, and the frames that it has given out; the decoder is the first
    process's."""

    sampler: Sampler
    decoder: StreamDecoder | None
    step_cache: StepCache | None
    frames: int = 0

    def state(self) -> SavedState:
        """What `restore` goes on from, taken at a boundary."""
        latents, trajectory = self.sampler.trajectory.state()
        memory, decoder = self.decoder.state() if self.decoder is not None else ({}, {})
        tensors = {
            **{f"latents.{name}": tensor for name, tensor in latents.items()},
            **{f"decoder.{name}": tensor for name, tensor in memory.items()},
            **{f"residual.{name}": tensor for name, tensor in self._residuals().items()},
        }
        rest = {"frames": self.frames, "trajectory": trajectory, "decoder": decoder}
        return SavedState(tensors, rest)

    def restore(self, saved: SavedState) -> None:
        """Go on where `state` was taken."""

        def part(prefix: str) -> dict[str, torch.Tensor]:
            prefix += "."
            return {
                name.removeprefix(prefix): tensor
                for name, tensor in saved.tensors.items()
                if name.startswith(prefix)
            }

        self.frames = saved.rest["frames"]
        self.sampler.restore(part("latents"), saved.rest["trajectory"])
        if self.decoder is not None:
            self.decoder.restore(part("decoder"), saved.rest["decoder"])
        if self.step_cache is not None:
            owns = self.sampler.sharing.owns
            residuals = part("residual").items()
            self.step_cache.restore({index: value for index, value in residuals if owns(int(index))})

    def _residuals(self) -> dict[str, torch.Tensor]:
        return {} if self.step_cache is None else self.step_cache.state()


class _Pace:
    """What cells and frames have taken, and what is left of so many `cells` and `frames`, None if not known.

    Cells and frames come in turn; the time since the last event is the event's own.
    """

    def __init__(self) -> None:
        self.cells_done = self.frames_done = 0
        self._earlier_cells = self._earlier_frames = 0
        self.last: Cell | None = None
        self._cell_seconds = self._frame_seconds = self._share = 0.0
        self._watch = Stopwatch()

    def go_on(self, cells: int, frames: int) -> None:
        """So many were done by an earlier run."""
        self.cells_done = self._earlier_cells = cells
        self.frames_done = self._earlier_frames = frames

    def begin(self) -> None:
        """The conditions are there; the next event's time begins now."""
        self._watch.lap()

    def cell(self, cell: Cell) -> None:
        """A cell has run."""
        self.last = cell
        self.cells_done += 1
        self._cell_seconds += self._watch.lap()

    def frame(self) -> None:
        """A frame is decoded."""
        self.frames_done += 1
        self._frame_seconds += self._watch.lap()

    def seconds_left(self, cells: int | None, frames: int | None) -> float | None:
        """Of cells and frames that are to come; frames count once one has been seen."""
        if cells is None or frames is None:
            return None
        cell, frame = self._paces()
        return cell * max(cells - self.cells_done, 0) + frame * (frames - self.frames_done)

    def _paces(self) -> tuple[float, float]:
        """Seconds of a cell and of a frame in this run."""
        return (
            self._cell_seconds / max(self.cells_done - self._earlier_cells, 1),
            self._frame_seconds / max(self.frames_done - self._earlier_frames, 1),
        )

    def share(self, cells: int | None, frames: int | None) -> float | None:
        """Of the work, an earlier run's too, by the time it takes; it does not fall when what is left turns
        out to take longer, and is 1 at the end alone."""
        left = self.seconds_left(cells, frames)
        if cells is None or left is None:
            return None
        if self.frames_done == frames:
            return 1.0
        cell, frame = self._paces()
        done = cell * self.cells_done + frame * self.frames_done
        share = done / (done + left) if done else self.cells_done / max(cells, 1)
        self._share = max(self._share, min(share, 0.99))
        return self._share


def as_pixels(frame: torch.Tensor) -> Frame:
    """A decoded frame [3, H, W] in -1..1 as uint8 [H, W, 3]."""
    pixels = ((frame + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 0).cpu().numpy()


def finite_pixels(frame: torch.Tensor, number: int) -> Frame:
    """The same of the `number`-th frame of a video. Raises SamplingError: it is not of finite numbers."""
    if not torch.isfinite(frame).all():
        raise SamplingError(
            f"frame {number} came out of the autoencoder without finite numbers: try --dtype float32"
        )
    return as_pixels(frame)


def _no_speech(_window: Window) -> None:
    return None
