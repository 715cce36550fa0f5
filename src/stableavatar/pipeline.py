"""Portrait, speech and prompt into a stream of frames, and into a file.

    pipeline = AvatarPipeline.from_pretrained("tiny")
    pipeline.generate("portrait.png", "speech.wav", "out.mp4")

The way of the data: portrait and speech -> conditions -> plan of windows -> cells -> latents -> frames ->
file.
"""

import contextlib
import difflib
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPVisionModel, PreTrainedTokenizerBase, UMT5EncoderModel, Wav2Vec2Model

from stableavatar import __version__
from stableavatar.checkpoints import hub
from stableavatar.checkpoints.layout import OWN_PARTS, detect_layout, find_published
from stableavatar.checkpoints.own import check_own
from stableavatar.checkpoints.published import load_published
from stableavatar.conditioning.image import picture_tensor
from stableavatar.errors import CheckpointError, InputError, StoppedError
from stableavatar.generation import Frame, ProgressCallback, Run, Work
from stableavatar.journal import (
    Journal,
    Saved,
    refuse_unfinished,
    speech_hash,
    tensor_hash,
    weights_fingerprint,
)
from stableavatar.media.audio import SPEECH_RATE, Sound, Speech
from stableavatar.media.image import check_size, convert_picture, fit_picture, read_picture
from stableavatar.media.live import LiveRecording, LiveSound, LiveSpeech
from stableavatar.media.segments import SegmentWriter
from stableavatar.media.timing import frame_count
from stableavatar.media.video import (
    STANDARD_OUTPUT,
    FrameWriter,
    VideoWriter,
    cannot_write,
    check_output,
    hidden_name,
    to_disk,
)
from stableavatar.models.transformer import StableAvatarTransformer3DModel
from stableavatar.options import GenerateOptions, OutputOptions, SamplingDefaults, Settings
from stableavatar.placement.convolutions import avoid_slow_convolutions
from stableavatar.placement.device import choose_device, choose_dtype
from stableavatar.sampling.noise import GivenNoise, Noise, PositionalNoise
from stableavatar.sampling.windows import GrowingPlan, Plan, WindowPlan, latent_frames_for, plan_windows

HUB_ARGUMENTS = ("revision", "token", "cache_dir")

TINY = Path(__file__).parent / "assets" / "tiny"

Portrait = str | Path | Image.Image | Frame
SpeechInput = str | Path | NDArray[np.float32] | LiveRecording | Iterable[NDArray[np.float32]]


class _LiveStopError(Exception):
    """A live run was asked to stop."""


class AvatarStream(Iterator[Frame]):
    """Frames of a video, uint8 `[height, width, 3]`, made as they are asked for.

    Attributes:
        frame_count (None where the speech is still arriving), frame_rate (frames a second), width, height: of
            the video.
        options: the options with every default filled in; with them the video can be repeated.
    """

    def __init__(self, run: Run) -> None:
        self._frames = run.frames()
        self._recording = run.speech
        self.frame_count = run.frame_count
        self.frame_rate = run.frame_rate
        self.options = run.options
        self.width = run.options.width
        self.height = run.options.height

    def __next__(self) -> Frame:
        return next(self._frames)

    def close(self) -> None:
        """Stop, and give up the decoded recording; needed only where the frames are not taken to the end."""
        self._frames.close()
        if self._recording is not None:
            self._recording.close()


@dataclass(frozen=True)
class GeneratedVideo:
    """What `generate` has made: the file, its length in frames, the options that repeat it, and the seconds
    until the first frame was there."""

    path: Path
    frame_count: int
    frame_rate: Fraction
    options: Settings
    first_frame_seconds: float


class AvatarPipeline(DiffusionPipeline):
    """Makes a portrait say a recording.

    A diffusers pipeline: `from_pretrained`, `save_pretrained`, `to`, `enable_model_cpu_offload` and the like
        work as there.

    Args:
        sampling_defaults: the model's own settings (`SamplingDefaults`), the released models' if None.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->speech_encoder->transformer->vae"

    transformer: StableAvatarTransformer3DModel
    vae: AutoencoderKLWan
    text_encoder: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    image_encoder: CLIPVisionModel
    speech_encoder: Wav2Vec2Model
    scheduler: FlowMatchEulerDiscreteScheduler

    def __init__(
        self,
        transformer: StableAvatarTransformer3DModel,
        vae: AutoencoderKLWan,
        text_encoder: UMT5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        image_encoder: CLIPVisionModel,
        speech_encoder: Wav2Vec2Model,
        scheduler: FlowMatchEulerDiscreteScheduler,
        sampling_defaults: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            image_encoder=image_encoder,
            speech_encoder=speech_encoder,
            scheduler=scheduler,
        )
        avoid_slow_convolutions(self.vae)
        self.origin: dict[str, str] = {}  # what it was loaded from, for the metadata of videos
        self.defaults = SamplingDefaults(**(sampling_defaults or {}))
        self.register_to_config(sampling_defaults=asdict(self.defaults))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        variant: str | None = None,
        size: str | None = None,
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> "AvatarPipeline":
        """Load a model.

        Args:
            source: "tiny" (ships with the package), a folder (this project's own, or the published
                checkpoints as they lie on disk), or a hub id such as "FrancisRing/StableAvatar".
            variant: which of the published transformers, "square" (the default) or "rec-vec".
            size: of the published checkpoints, "1.3b" (the default) or "14b".
            dtype: of the weights.
            kwargs: `revision`, `token` and `cache_dir` for a hub id; for an own folder, as in diffusers.

        Raises:
            CheckpointError: files are missing, damaged, or of another model.
            InputError: there is no such folder; a variant or a size is asked of a folder that holds one
                model.
        """
        published = {"variant": variant or "square", "size": size or "1.3b"}
        folder = TINY if str(source) == "tiny" else Path(source).expanduser()
        if folder == TINY and not folder.is_dir():
            raise CheckpointError(
                "this copy of the package came without the weights of tiny; train them (make tiny), or name "
                "another model"
            )
        if not folder.is_dir():
            places = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
            folder = hub.resolve(str(source), **published, **places)
        if detect_layout(folder) == "own":
            if variant is not None or size is not None:
                raise InputError(
                    f"{source} is one model: variant and model size choose among the published checkpoints"
                )
            check_own(folder, [part for part in OWN_PARTS if part not in kwargs])
            kwargs.setdefault("local_files_only", True)
            pipeline = super().from_pretrained(folder, dtype=dtype, **kwargs)
            pipeline.speech_encoder.float()  # its features feed every window, and it is small
            pipeline.origin = {"model": str(source)}
            return pipeline
        if kwargs:
            raise InputError(f"{', '.join(kwargs)} cannot be used with the published checkpoints in {folder}")
        pipeline = cls(**load_published(find_published(folder), dtype=dtype, **published))
        pipeline.origin = {
            "model": str(source),
            "variant": published["variant"],
            "model_size": published["size"],
        }
        return pipeline

    def stream(
        self,
        portrait: Portrait,
        speech: SpeechInput | None,
        *,
        latents: torch.Tensor | None = None,
        progress: ProgressCallback | None = None,
        **options: Any,
    ) -> AvatarStream:
        """Frames of the portrait saying the speech.

        Args:
            portrait: a picture file, a Pillow image, or uint8 `[H, W, 3]`.
            speech: an audio file, a video with sound, mono samples at 16 kHz, or None for a silent video of
                `duration` seconds. Speech that is still arriving: an iterator of such samples, or a
                `media.live.LiveRecording` (whose `sound` is kept until it is taken); it is asked for more
                when a window needs it.
            latents: the starting noise `[C, L, H/8, W/8]`, in place of the seed's.
            progress: called after every cell and every frame.
            options: fields of `GenerateOptions`.

        Returns:
            An iterator of uint8 `[height, width, 3]`. The conditions are checked now, the work is done as
            frames are asked for; `order` says how much of it comes before the first.

        Raises:
            InputError: a file or an option that cannot be used.
        """
        given = _options(options)
        live = _live(speech, given)
        if live is not speech and isinstance(live, LiveRecording):
            live.sound.wanted = False  # frames alone are asked for
        return AvatarStream(self._open(portrait, live, given, latents, progress))

    def _open(
        self,
        portrait: Portrait,
        speech: SpeechInput | None,
        given: GenerateOptions,
        latents: torch.Tensor | None,
        progress: ProgressCallback | None,
    ) -> Run:
        picture = _picture(portrait)
        recording = _recording(speech, given)
        try:
            return self._run(given, picture, recording, latents, progress)
        except BaseException:
            if recording is not None:
                recording.close()
            raise

    def _run(
        self,
        given: GenerateOptions,
        picture: Frame,
        recording: Speech | LiveSpeech | None,
        latents: torch.Tensor | None,
        progress: ProgressCallback | None,
    ) -> Run:
        options = self._resolve(given, picture)
        fps = options.frame_rate
        frames, plan = _plan(recording, options)
        ratio = self.vae.config.scale_factor_spatial
        shape = (self.vae.config.z_dim, options.height // ratio, options.width // ratio)
        if latents is None:
            noise: Noise = PositionalNoise(options.seed, *shape)
        elif not isinstance(plan, WindowPlan):
            raise InputError("latents cannot be given for speech that is still arriving: give a seed")
        elif latents.shape == (shape[0], plan.latent_frames, *shape[1:]):
            noise = GivenNoise(latents)
        else:
            wanted = (shape[0], plan.latent_frames, *shape[1:])
            raise InputError(f"latents of shape {tuple(latents.shape)} do not fit: {wanted} is needed")
        fitted = fit_picture(picture, options.width, options.height, options.fit)
        return Run(self, options, plan, frames, fps, picture_tensor(fitted), recording, noise, progress)

    def _resolve(self, given: GenerateOptions, picture: Frame) -> Settings:
        """The options with the model's settings, a size and a seed in place of None."""
        if given.width is not None and given.height is not None:
            size = given.width, given.height
        else:
            size = self.defaults.size_for(given.aspect, picture.shape[1], picture.shape[0])
        return Settings.resolve(
            given,
            self.defaults,
            size=size,
            seed=secrets.randbelow(2**32),
        )

    def generate(
        self,
        portrait: Portrait,
        speech: SpeechInput | None,
        output: str | Path,
        *,
        output_options: OutputOptions | None = None,
        resume: bool | None = None,
        stop: Callable[[], bool] | None = None,
        latents: torch.Tensor | None = None,
        progress: ProgressCallback | None = None,
        **options: Any,
    ) -> GeneratedVideo:
        """Write the portrait saying the speech as an MP4 with sound.

        The file appears under its name when it is complete. In its metadata are the model, the version, and
        every option and the seed, so that it can be made again. While it is made, a hidden folder beside it
        (`.NAME.journal`) keeps what is finished, from which a run that was interrupted or killed goes on.

        Args:
            output: the MP4. output_options: quality, preset, a folder for PNG frames, how often the state is
                saved, and whether the file is to play while it grows, which keeps no journal.
            resume: True goes on with what was begun there (a seed that is not given is that run's), False
                begins anew; None refuses where something was begun.
            stop: asked between cells; when it says so, the state is saved and what is finished is put beside
                the output as `NAME.unfinished.mp4`.
            portrait, speech, latents, progress, options: see `stream`.

        Raises:
            InputError: a file or an option that cannot be used, an output that cannot be written, another
                process that makes this video, or a journal of other inputs, settings or weights.
            StoppedError: `stop` said so.
        """
        encoding = output_options or OutputOptions()
        given = _options(options)
        speech = _live(speech, given)
        if encoding.live or isinstance(speech, LiveRecording) or str(output) == STANDARD_OUTPUT:
            if resume:
                raise InputError("what is written or spoken live cannot be resumed: leave out --resume")
            run = self._open(portrait, speech, given, latents, progress)
            return self._generate_live(run, speech, output, encoding, stop)
        path = check_output(output)
        if resume is None:
            refuse_unfinished(path)
        with contextlib.ExitStack() as stack:
            journal = Journal(path, anew=resume is False)
            stack.callback(lambda: journal.close(remove=not journal.has_state))
            if resume and not journal.has_state and path.exists():
                raise InputError(
                    f"output {output}: is complete; there is nothing to go on with. Add --overwrite to make "
                    "it anew."
                )
            if resume and given.seed is None and "seed" in journal.settings:
                given = replace(given, seed=journal.settings["seed"])
            run = self._open(portrait, speech, given, latents, progress)
            try:
                return self._generate(run, speech, journal, encoding, resume=resume, stop=stop)
            except InputError as error:
                if not journal.has_state or "--resume" in str(error):
                    raise
                raise InputError(f"{error} Then the same command with --resume goes on.") from error
            except KeyboardInterrupt:
                if stop is None or not journal.has_state:
                    raise
                raise StoppedError(
                    "Interrupted. The same command with --resume goes on from the state that was saved last."
                ) from None

    def _generate(
        self,
        run: Run,
        speech: SpeechInput | None,
        journal: Journal,
        encoding: OutputOptions,
        *,
        resume: bool | None,
        stop: Callable[[], bool] | None,
    ) -> GeneratedVideo:
        started, first_frame = time.monotonic(), 0.0
        saved_at, save_seconds = started, 0.0
        settings = self._settings(run, encoding)
        identity = {**self._identity(run, settings), "frames folder": encoding.frames is not None}
        saved = journal.load(identity) if resume else None
        if saved is None:
            journal.begin(identity)
        rest: Mapping[str, Any] = {"segments": [], "frames": 0} if saved is None else saved.rest
        video = SegmentWriter(
            journal.folder,
            run.options.width,
            run.options.height,
            run.frame_rate,
            quality=encoding.quality,
            preset=encoding.preset,
            segments=rest["segments"],
        )

        kept = None
        pictures: FrameWriter | None = None
        if encoding.frames is not None:  # beside their folder, which may lie on another file system
            folder = encoding.frames.expanduser().absolute()
            kept = folder.with_name(hidden_name(folder.name, "pictures"))
            pictures = FrameWriter(encoding.frames, partial=kept, done=rest["frames"])

        def save(work: Work) -> None:
            nonlocal saved_at, save_seconds
            began = time.monotonic()
            if pictures is not None:
                pictures.sync()
            state = work.state()
            journal.save(Saved(state.tensors, {**state.rest, "segments": video.segments}))
            saved_at = time.monotonic()
            save_seconds = saved_at - began

        def between(work: Work) -> None:
            video.cut()
            if stop is not None and stop():
                save(work)
                raise self._interrupted(run, speech, journal, video)
            every = encoding.checkpoint_every
            # The state may be large and the disk slow: saving takes at most a twentieth of the time.
            if every == 0 or time.monotonic() - saved_at >= max(every, 20 * save_seconds):
                save(work)

        with contextlib.ExitStack() as stack:
            stack.callback(video.abandon)
            stream = stack.enter_context(
                contextlib.closing(AvatarStream(replace(run, between=between, saved=saved)))
            )
            if kept is not None:
                stack.callback(lambda: None if journal.has_state else shutil.rmtree(kept, ignore_errors=True))
            if pictures is not None:  # before the video is joined, so that the folder gets its name after it
                stack.enter_context(pictures)
            for frame in stream:
                first_frame = first_frame or time.monotonic() - started
                video.write(frame)
                if pictures is not None:
                    pictures.write(frame)
            video.cut()
            metadata = {"stableavatar": json.dumps(settings, ensure_ascii=False)}
            self._join(run, speech, journal, video, journal.output, metadata)
        journal.finish()
        return GeneratedVideo(journal.output, video.frames, run.frame_rate, run.options, first_frame)

    def _interrupted(
        self, run: Run, speech: SpeechInput | None, journal: Journal, video: SegmentWriter
    ) -> StoppedError:
        """What is there as a file that plays, and what to say of it."""
        if not video.segments:
            return StoppedError(
                "Interrupted before the first frame. The same command with --resume goes on from here."
            )
        self._join(run, speech, journal, video, journal.unfinished, {})
        seconds = float(video.frames / run.frame_rate)
        return StoppedError(
            f"Interrupted: {journal.unfinished} plays the {seconds:.1f} s that are finished. The same "
            "command with --resume goes on from here."
        )

    def _join(
        self,
        run: Run,
        speech: SpeechInput | None,
        journal: Journal,
        video: SegmentWriter,
        target: Path,
        metadata: Mapping[str, str],
    ) -> None:
        """The segments as a file that appears under its name when it is complete and on the disk."""
        joined = journal.folder / "joined.mp4"
        video.join(joined, sound=_sound(speech, run.options), metadata=metadata)
        try:
            joined.replace(target)
            to_disk(target.parent)
        except OSError as error:
            raise cannot_write(target, error) from error

    def _generate_live(
        self,
        run: Run,
        speech: SpeechInput | None,
        output: str | Path,
        encoding: OutputOptions,
        stop: Callable[[], bool] | None,
    ) -> GeneratedVideo:
        started, first_frame = time.monotonic(), 0.0

        def between(_work: Work) -> None:
            if stop is not None and stop():
                raise _LiveStopError

        metadata = {"stableavatar": json.dumps(self._settings(run, encoding), ensure_ascii=False)}
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(contextlib.closing(AvatarStream(replace(run, between=between))))
            pictures = stack.enter_context(FrameWriter(encoding.frames)) if encoding.frames else None
            video = stack.enter_context(
                VideoWriter(
                    output,
                    stream.width,
                    stream.height,
                    stream.frame_rate,
                    sound=_sound(speech, stream.options),
                    quality=encoding.quality,
                    preset=encoding.preset,
                    metadata=metadata,
                    live=encoding.live,
                )
            )
            stopped = False
            try:
                for frame in stream:
                    first_frame = first_frame or time.monotonic() - started
                    video.write(frame)
                    if pictures is not None:
                        pictures.write(frame)
            except _LiveStopError:
                stopped = True
                if not video.frames:
                    raise StoppedError("Interrupted before the first frame.") from None
        if stopped:
            seconds = float(video.frames / stream.frame_rate)
            raise StoppedError(f"Interrupted: {output} plays the {seconds:.1f} s that were made.")
        return GeneratedVideo(Path(output), video.frames, stream.frame_rate, stream.options, first_frame)

    def _settings(self, run: Run, encoding: OutputOptions) -> dict[str, Any]:
        """Everything that repeats a video, as JSON."""
        return {
            "version": __version__,
            **self.origin,
            "dtype": str(self.transformer.dtype).removeprefix("torch."),
            **{f.name: getattr(run.options, f.name) for f in fields(run.options)},
            "quality": encoding.quality,
            "preset": encoding.preset,
        }

    def _identity(self, run: Run, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What must be the same for a run to be gone on with."""
        assert not isinstance(run.speech, LiveSpeech)
        modules = {name: part for name, part in self.components.items() if isinstance(part, torch.nn.Module)}
        return {
            "settings": dict(settings),
            "portrait": tensor_hash(run.picture),
            "speech": speech_hash(run.speech),
            "noise": tensor_hash(run.noise.latents) if isinstance(run.noise, GivenNoise) else None,
            "weights": weights_fingerprint(modules),
        }


def load(
    source: str | Path = "tiny", *, device: str = "auto", dtype: str = "auto", **kwargs: Any
) -> AvatarPipeline:
    """Load a model and put it on a device.

    Args:
        source: "tiny", a folder, or a hub id; see `AvatarPipeline.from_pretrained`, which also takes
            `kwargs`.
        device: "auto" (CUDA, then Apple's MPS, then the CPU) or a torch device.
        dtype: "auto" (bfloat16 on CUDA, float32 elsewhere), "float32", "bfloat16" or "float16".

    Raises:
        InputError: an unknown device or dtype, or a device that is not there.
        CheckpointError: see `from_pretrained`.
    """
    chosen = choose_device(device)
    return AvatarPipeline.from_pretrained(source, dtype=choose_dtype(dtype, chosen), **kwargs).to(chosen)


def generate(
    portrait: Portrait,
    speech: SpeechInput | None,
    output: str | Path,
    *,
    model: str | Path = "tiny",
    **options: Any,
) -> GeneratedVideo:
    """Write the portrait saying the speech as an MP4 with sound; see `AvatarPipeline.generate`."""
    return load(model).generate(portrait, speech, output, **options)


def _picture(portrait: Portrait) -> Frame:
    if isinstance(portrait, str | Path):
        return read_picture(portrait)
    if isinstance(portrait, Image.Image):
        return convert_picture(portrait, "the portrait")
    if portrait.ndim != 3 or portrait.shape[2] != 3 or portrait.dtype != np.uint8:
        raise InputError(
            "a portrait given as an array must be uint8 [H, W, 3], "
            f"not {portrait.dtype} {list(portrait.shape)}"
        )
    check_size("the portrait", portrait.shape[1], portrait.shape[0])
    return portrait


def _live(speech: SpeechInput | None, options: GenerateOptions) -> SpeechInput | None:
    """Speech that is still arriving as a recording; every other as it is."""
    given = speech
    if speech is None or isinstance(speech, str | Path | np.ndarray | LiveRecording):
        live = isinstance(speech, LiveRecording)
    else:
        speech, live = LiveRecording(speech, duration=options.duration), True
    if live and options.start:
        raise InputError("start cannot be used with speech that is still arriving: leave it at 0")
    if isinstance(given, LiveRecording) and options.duration is not None:
        raise InputError("give the duration to the LiveRecording, where it is made")
    return speech


def _recording(speech: SpeechInput | None, options: GenerateOptions) -> Speech | LiveSpeech | None:
    if speech is None:
        return None
    if isinstance(speech, LiveRecording):
        return speech.speech
    if isinstance(speech, str | Path):
        return Speech.open(speech, SPEECH_RATE, start=options.start, duration=options.duration)
    assert isinstance(speech, np.ndarray)
    return Speech.from_array(_cut(speech, options), SPEECH_RATE)


def _cut(samples: NDArray[np.float32], options: GenerateOptions) -> NDArray[np.float32]:
    first = round(options.start * SPEECH_RATE)
    last = None if options.duration is None else first + round(options.duration * SPEECH_RATE)
    return samples[first:last]


def _sound(speech: SpeechInput | None, options: GenerateOptions) -> Sound | LiveSound | None:
    if speech is None:
        return None
    if isinstance(speech, LiveRecording):
        return speech.sound
    if isinstance(speech, str | Path):
        return Sound(speech, options.start, options.duration)
    assert isinstance(speech, np.ndarray)
    return Sound.from_array(_cut(speech, options), SPEECH_RATE)


def _options(values: dict[str, Any]) -> GenerateOptions:
    known = [f.name for f in fields(GenerateOptions)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(f"there is no option {name}" + (f"; did you mean {near[0]}?" if near else ""))
    return GenerateOptions(**values)


def _plan(recording: Speech | LiveSpeech | None, options: Settings) -> tuple[int | None, Plan]:
    """Frames of the video, None while they are not known, and its windows."""
    window = latent_frames_for(options.window)
    if isinstance(recording, LiveSpeech):
        if options.speech_normalisation == "recording":
            raise InputError(
                "the loudness of a whole recording is not known while it arrives: leave speech-normalisation "
                "at window"
            )
        if options.compat is not None or options.order == "lockstep":
            raise InputError(
                "speech that is still arriving needs the order wavefront or causal, without compat"
            )
        return None, GrowingPlan(
            window, options.overlap, partial(_live_latents, recording, options.frame_rate)
        )
    frames = _frames(recording, options)
    if options.compat == "upstream":
        frames = (frames - 1) // 4 * 4 + 1
    return frames, plan_windows(latent_frames_for(frames), window, options.overlap, compat=options.compat)


def _live_latents(speech: LiveSpeech, fps: Fraction, wanted: int) -> int | None:
    """See `GrowingPlan`: waits for the first frame that needs so many latent frames."""
    if speech.wait_frames(max(4 * (wanted - 2) + 2, 1), fps):
        return None
    assert speech.length is not None
    frames = frame_count(speech.length, SPEECH_RATE, fps)
    if frames < 1:
        raise _too_short(f"the speech ({speech.length / SPEECH_RATE:.3f} s)", fps)
    return latent_frames_for(frames)


def _frames(recording: Speech | None, options: Settings) -> int:
    """Frames of the video: of the duration that was asked for, else of the recording."""
    fps = options.frame_rate
    if recording is not None and Fraction(len(recording), SPEECH_RATE) * fps < 1:
        what = f"the speech ({recording.seconds:.3f} s)"
    elif options.duration is not None and Fraction(options.duration) * fps < 1:
        what = f"a duration of {options.duration} s"
    elif options.duration is not None:
        return round(Fraction(options.duration) * fps)
    elif recording is not None:
        return frame_count(len(recording), SPEECH_RATE, fps)
    else:
        raise InputError("a video without speech needs a duration")
    raise _too_short(what, fps)


def _too_short(what: str, fps: Fraction) -> InputError:
    return InputError(f"{what} is shorter than a frame ({float(1 / fps):.3f} s): give a longer one")
