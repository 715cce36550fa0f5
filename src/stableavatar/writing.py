"""A run into a file: one that is complete under its name or not there, or one that plays while it grows."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from stableavatar import __version__
from stableavatar.errors import GO_ON, InputError, ProcessError, StoppedError, StorageError
from stableavatar.generation import Run
from stableavatar.journal import Journal, SavedState
from stableavatar.media.audio import Sound
from stableavatar.media.encoding import Writable
from stableavatar.media.files import cannot_write, hidden_name, to_disk
from stableavatar.media.live import LiveSound
from stableavatar.media.segments import SegmentWriter
from stableavatar.media.video import STANDARD_OUTPUT, FrameWriter, VideoWriter
from stableavatar.options import OutputOptions, Settings
from stableavatar.sampling.noise import GivenNoise
from stableavatar.sampling.sharing import Wish

# Saving a state may take this share of the time: it can be large and the disk slow.
_SAVING = 1 / 20

Stop = Callable[[], bool]


@dataclass(frozen=True)
class GeneratedVideo:
    """What `generate` has made.

    Attributes:
        path: the file; None where it went elsewhere.
        frame_count: of the video.
        frame_rate: frames a second.
        options: with every default filled in; with them the video can be repeated.
        first_frame_seconds: until the first frame was there.
    """

    path: Path | None
    frame_count: int
    frame_rate: Fraction
    options: Settings
    first_frame_seconds: float


def write_video(
    run: Run,
    sound: Sound | None,
    journal: Journal,
    encoding: OutputOptions,
    *,
    resume: bool,
    stop: Stop | None,
) -> GeneratedVideo:
    """Make the journal's video; see `AvatarPipeline.generate`.

    Raises:
        InputError: what was begun belongs to another run, or something cannot be written.
        ProcessError: another process was lost, or has ended.
        StoppedError: `stop` said so.
    """
    try:
        return _VideoFile(run, sound, journal, encoding, stop).write(resume)
    except InputError as error:
        if not journal.has_state or "--resume" in str(error):
            raise
        kind = StorageError if isinstance(error, StorageError) else InputError
        raise kind(f"{error}{GO_ON}") from error
    except ProcessError as error:
        if not journal.has_state:
            raise
        raise ProcessError(
            f"{error}. The same command with --resume goes on from the state that was saved last."
        ) from error
    except KeyboardInterrupt:
        if stop is None or not journal.has_state:
            raise
        raise StoppedError(
            "Interrupted. The same command with --resume goes on from the state that was saved last."
        ) from None


class _VideoFile:
    """The file that a run becomes, by way of a journal: segments, pictures, and the state now and then."""

    def __init__(
        self, run: Run, sound: Sound | None, journal: Journal, encoding: OutputOptions, stop: Stop | None
    ) -> None:
        self.run = run
        self.sound = sound
        self.journal = journal
        self.encoding = encoding
        self.stop = stop
        self._saved_at, self._save_seconds = time.monotonic(), 0.0
        self._wished = Wish.GO_ON

    def write(self, resume: bool) -> GeneratedVideo:
        """Make it, from its beginning or from what was saved."""
        run, journal, encoding = self.run, self.journal, self.encoding
        started, first_frame = time.monotonic(), 0.0
        settings = settings_of(run, encoding)
        identity = {"settings": settings, **run.inputs, "frames folder": encoding.frames is not None}
        saved = journal.load(identity) if resume else None
        if saved is None:
            journal.begin(identity)
        rest: Mapping[str, Any] = {"segments": 0, "frames": 0} if saved is None else saved.rest
        self.video = SegmentWriter(
            journal.folder,
            run.options.width,
            run.options.height,
            run.frame_rate,
            quality=encoding.quality,
            preset=encoding.preset,
            segments=rest["segments"],
            frames=rest["frames"],
        )
        self.pictures = self._pictures(rest["frames"])
        with contextlib.ExitStack() as stack:
            stack.callback(self.video.abandon)
            stack.callback(run.close)
            frames = run.frames(self, saved)
            stack.enter_context(contextlib.closing(frames))
            if self.pictures is not None:  # before the video is joined: the folder gets its name after it
                stack.enter_context(self.pictures)
            for frame in frames:
                first_frame = first_frame or time.monotonic() - started
                self.video.write(frame)
                if self.pictures is not None:
                    self.pictures.write(frame)
            self.video.cut()
            self._join(journal.output, {"stableavatar": json.dumps(settings, ensure_ascii=False)})
        journal.finish()
        return GeneratedVideo(journal.output, self.video.frames, run.frame_rate, run.options, first_frame)

    def _pictures(self, done: int) -> FrameWriter | None:
        """Beside their own folder, which may lie on another file system than the video; by the video's
        place too, since two may be meant for one folder, and only the one that is complete first gets it."""
        if self.encoding.frames is None:
            return None
        folder = self.encoding.frames.expanduser().absolute()
        place = os.fsencode(os.path.relpath(self.journal.output, folder.parent))  # may be moved with it
        own = hashlib.blake2b(place, digest_size=4).hexdigest()
        partial = folder.with_name(hidden_name(folder.name, f"{own}.pictures"))
        return FrameWriter(
            self.encoding.frames, partial=partial, done=done, keep=lambda: self.journal.has_state
        )

    def wish(self) -> Wish:
        """See `Keeper`."""
        every = self.encoding.checkpoint_every
        due = every == 0 or time.monotonic() - self._saved_at >= max(every, self._save_seconds / _SAVING)
        if self.stop is not None and self.stop():
            self._wished = Wish.STOP
        else:
            self._wished = Wish.SAVE if due else Wish.GO_ON
        return self._wished

    def reached(self, state: SavedState | None) -> None:
        """See `Keeper`."""
        self.video.cut()
        if state is not None:
            self._save(state)
        if self._wished == Wish.STOP:
            raise self._stopped()

    def _save(self, state: SavedState) -> None:
        began = time.monotonic()
        if self.pictures is not None:
            self.pictures.sync()
        self.journal.save(SavedState(state.tensors, {**state.rest, "segments": self.video.segments}))
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - began

    def _stopped(self) -> StoppedError:
        """What is there as a file that plays, and what to say of it."""
        if not self.video.segments:
            return StoppedError(
                "Interrupted before the first frame. The same command with --resume goes on from here."
            )
        self._join(self.journal.unfinished, {})
        seconds = float(self.video.frames / self.run.frame_rate)
        return StoppedError(
            f"Interrupted: {self.journal.unfinished} plays the {seconds:.1f} s that are finished. The same "
            "command with --resume goes on from here."
        )

    def _join(self, target: Path, metadata: Mapping[str, str]) -> None:
        """The segments as a file that appears under its name when it is complete and on the disk."""
        joined = self.journal.folder / "joined.mp4"
        self.video.join(joined, sound=self.sound, metadata=metadata)
        try:
            joined.replace(target)
            to_disk(target.parent)
        except OSError as error:
            raise cannot_write(target, error) from error


def write_live(
    run: Run,
    sound: Sound | LiveSound | None,
    output: str | Path | Writable,
    encoding: OutputOptions,
    stop: Stop | None,
) -> GeneratedVideo:
    """Make a video whose speech or whose file is live; nothing is kept to go on from.

    Raises:
        InputError: the speech cannot be read, or the file cannot be written.
        StoppedError: `stop` said so; the file ends there, and plays.
    """
    started, first_frame = time.monotonic(), 0.0
    metadata = {"stableavatar": json.dumps(settings_of(run, encoding), ensure_ascii=False)}

    with contextlib.ExitStack() as stack:
        stack.callback(run.close)
        frames = stack.enter_context(contextlib.closing(run.frames(_Stopper(stop))))
        pictures = stack.enter_context(FrameWriter(encoding.frames)) if encoding.frames else None
        video = stack.enter_context(
            VideoWriter(
                output,
                run.options.width,
                run.options.height,
                run.frame_rate,
                sound=sound,
                quality=encoding.quality,
                preset=encoding.preset,
                metadata=metadata,
                live=encoding.live,
            )
        )
        stopped: StoppedError | None = None
        try:
            for frame in frames:
                first_frame = first_frame or time.monotonic() - started
                video.write(frame)
                if pictures is not None:
                    pictures.write(frame)
        except StoppedError:
            if not video.frames:
                raise
            seconds = float(video.frames / run.frame_rate)
            name = output if isinstance(output, str | Path) else "it"
            stopped = StoppedError(f"Interrupted: {name} plays the {seconds:.1f} s that were made.")
    if stopped is not None:
        raise stopped
    path = Path(output) if isinstance(output, str | Path) and str(output) != STANDARD_OUTPUT else None
    return GeneratedVideo(path, video.frames, run.frame_rate, run.options, first_frame)


class _Stopper:
    """A keeper that keeps nothing."""

    def __init__(self, stop: Stop | None) -> None:
        self.stop = stop
        self._stopped = False

    def wish(self) -> Wish:
        self._stopped = self.stop is not None and self.stop()
        return Wish.STOP if self._stopped else Wish.GO_ON

    def reached(self, state: SavedState | None) -> None:
        if self._stopped:
            raise StoppedError("Interrupted before the first frame.")


def settings_of(run: Run, encoding: OutputOptions) -> dict[str, Any]:
    """Everything that repeats a video, as JSON can hold it; and under "by_hand", in words, what a program did
    beside it."""
    transformer = run.pipeline.transformer
    attached = transformer.active_adapters() if getattr(transformer, "peft_config", None) else []
    by_hand = [f"LoRA {name} was attached" for name in attached]  # of merged ones the origin tells
    if isinstance(run.noise, GivenNoise):
        by_hand.append("the starting latents were given")
    return {
        "version": __version__,
        **run.pipeline.origin,
        "dtype": str(transformer.dtype).removeprefix("torch."),
        **{f.name: getattr(run.options, f.name) for f in fields(run.options)},
        "quality": encoding.quality,
        "preset": encoding.preset,
        **({"by_hand": by_hand} if by_hand else {}),
    }
