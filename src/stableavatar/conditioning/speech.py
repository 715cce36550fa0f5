"""Speech into features, window by window, at exact positions (spec 2; faults 1, 7, 8, 17, 18)."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Wav2Vec2Model

from stableavatar.choices import SpeechNormalisation
from stableavatar.media.audio import SPEECH_RATE, Speech
from stableavatar.media.timing import sample_position
from stableavatar.sampling.windows import Plan, Window


class SpeechSource(Protocol):
    """Mono samples at 16 kHz, which may still be arriving."""

    def samples(self, start: int, stop: int) -> NDArray[np.float32]:
        """Samples [stop - start]; zeros outside the recording."""
        ...

    def close(self) -> None:
        """Let go of the recording."""
        ...


@dataclass(frozen=True)
class Normalisation:
    """Mean and variance by which samples are normalised."""

    mean: float
    variance: float

    @classmethod
    def of(cls, samples: NDArray[np.float32]) -> "Normalisation":
        """Of a stretch of samples."""
        return cls(float(np.mean(samples)), float(np.var(samples)))

    @classmethod
    def of_recording(cls, speech: Speech, block: int = 60 * SPEECH_RATE) -> "Normalisation":
        """Of a whole recording, read block by block."""
        total = square = 0.0
        for start in range(0, len(speech), block):
            samples = speech.samples(start, min(start + block, len(speech))).astype(np.float64)
            total += float(samples.sum())
            square += float(samples @ samples)
        count = max(len(speech), 1)  # nothing was said: silence of the length that was asked for
        mean = total / count
        return cls(mean, max(square / count - mean * mean, 0.0))

    def normalise(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """(x - mean) / sqrt(variance + 1e-7), as the speech encoder was trained."""
        return ((samples - self.mean) / np.sqrt(self.variance + 1e-7)).astype(np.float32)


@torch.no_grad()
def speech_features(
    speech_encoder: Wav2Vec2Model,
    samples: NDArray[np.float32],
    normalisation: Normalisation | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Features `[1, S, audio_dim]` of samples `[n]`, about 50 a second.

    Args:
        normalisation: what to normalise by; by default the samples' own.
        device: where the encoder computes, by default where its weights lie.
    """
    normalised = (normalisation or Normalisation.of(samples)).normalise(samples)
    values = torch.from_numpy(normalised)[None].to(device or speech_encoder.device, speech_encoder.dtype)
    return speech_encoder(values).last_hidden_state


class WindowSpeech:
    """Speech features of the windows of a plan, computed once for each (fault 8).

    A window of T frames gets the speech of T frames, from its first frame's position on (fault 1); silence
    follows where the recording has ended. Under `compat="upstream"` it gets that of 4·F frames, and the last
    one all that is left.

    Args:
        normalisation: "window" (published) normalises each window's samples to unit variance, which amplifies
            a pause to the loudness of speech; "recording" uses mean and variance of the whole recording
            (fault 17).
    """

    def __init__(
        self,
        speech_encoder: Wav2Vec2Model,
        speech: SpeechSource,
        plan: Plan,
        fps: Fraction,
        *,
        normalisation: SpeechNormalisation = "window",
        device: torch.device | None = None,
    ) -> None:
        self.speech_encoder = speech_encoder
        self.speech = speech
        self.plan = plan
        self.fps = fps
        self.device = device
        self.normalisation = None
        if normalisation == "recording":
            if not isinstance(speech, Speech):
                raise ValueError("the loudness of a whole recording is not known while it arrives")
            self.normalisation = Normalisation.of_recording(speech)
        self._features: dict[int, torch.Tensor] = {}

    def stretch(self, window: Window) -> tuple[int, int]:
        """First sample of a window's speech, and the one after its last."""
        first = 4 * window.start
        if self.plan.compat != "upstream":
            return self._position(first), self._position(first + 4 * (window.length - 1) + 1)
        if isinstance(self.speech, Speech) and self.plan.window(window.index + 1) is None:
            own = self._position(first + 4 * (window.length - 1) + 1)  # a video may be longer than its speech
            return self._position(first), max(len(self.speech), own)
        return self._position(first), self._position(first + 4 * window.length)

    def _position(self, frame: int) -> int:
        return sample_position(frame, SPEECH_RATE, self.fps)

    def __call__(self, window: Window) -> torch.Tensor:
        """Features `[1, S, audio_dim]` of a window, kept in main memory from the first call to `release`."""
        if window.index not in self._features:
            samples = self.speech.samples(*self.stretch(window))
            features = speech_features(self.speech_encoder, samples, self.normalisation, self.device)
            self._features[window.index] = features.cpu()
        return self._features[window.index]

    def release(self, window: Window) -> None:
        """Let a window's features go: it has taken its last step."""
        self._features.pop(window.index, None)
