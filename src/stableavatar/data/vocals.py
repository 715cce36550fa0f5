"""The voice out of a recording with music: an MDX network (Kim_Vocal_2.onnx is one) run by onnxruntime.

The network sees pieces of sound as short-time spectra and gives the spectra of the voice. Pieces overlap and
are faded into each other, so that a recording of any length is streamed through.
"""

import importlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from stableavatar.errors import CheckpointError, InputError, extra_missing
from stableavatar.media.audio import Samples
from stableavatar.media.decoding import stream_sound
from stableavatar.media.files import refuse_source
from stableavatar.media.wav import write_wav

SAMPLE_RATE = 44_100  # what these networks were trained at
HOP = 1024
# Share of a piece that it has in common with the next one.
OVERLAP = 0.25
# Frequencies that the networks are not given: they are below every voice.
_LOWEST_BINS = 3


class VocalSeparator:
    """A network that keeps the voice.

    Args:
        path: of the ONNX file. Its input says how many frequencies and frames a piece has.
        n_fft: samples of a spectrum; 7680 for Kim_Vocal_2.
        compensation: what its result is multiplied by, as published with the network.

    Raises:
        InputError: onnxruntime is not installed.
        CheckpointError: the file is missing, damaged, or no such network.
    """

    def __init__(self, path: Path, *, n_fft: int = 7680, compensation: float = 1.009) -> None:
        try:
            runtime = importlib.import_module("onnxruntime")
        except ImportError as error:
            raise extra_missing("separating vocals needs onnxruntime", "vocals") from error
        if not path.is_file():
            raise CheckpointError(
                f"{path}: there is no such file. Kim_Vocal_2.onnx lies beside the published weights: "
                "stableavatar download --vocals"
            )
        try:
            self._session = runtime.InferenceSession(str(path), providers=runtime.get_available_providers())
        except Exception as error:  # onnxruntime's own errors have no common type
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{path}: no network that onnxruntime can read ({reason})") from error
        described = self._session.get_inputs()[0]
        shape = described.shape
        if len(shape) != 4 or shape[1] != 4 or not all(isinstance(size, int) for size in shape[2:]):
            raise CheckpointError(f"{path}: its input is {shape}, not [batch, 4, frequencies, frames] of MDX")
        self._name = described.name
        self._bins, frames = int(shape[2]), int(shape[3])
        if not self._bins <= n_fft // 2 + 1:
            raise InputError(f"n_fft {n_fft} has fewer frequencies than the {self._bins} of {path}")
        self._n_fft, self._compensation = n_fft, compensation
        self._window = torch.hann_window(n_fft)
        self.piece = HOP * (frames - 1)
        self.overlap = round(OVERLAP * self.piece)

    def stream(self, blocks: Iterable[Samples]) -> Iterator[Samples]:
        """The voice of stereo sound at 44.1 kHz: blocks [n, 2] in, as many samples out."""
        step = self.piece - self.overlap
        waiting = np.zeros((0, 2), dtype=np.float32)
        tail = None  # of the piece before, faded out
        for block in blocks:
            waiting = np.concatenate([waiting, block])
            while len(waiting) > self.piece:
                made, tail = self._faded(self._voice(waiting[: self.piece]), tail)
                yield made
                waiting = waiting[step:]
        if len(waiting):
            padded = np.zeros((self.piece, 2), dtype=np.float32)
            padded[: len(waiting)] = waiting
            made, rest = self._faded(self._voice(padded), tail)
            yield np.concatenate([made, rest])[: len(waiting)]

    def _faded(self, voice: Samples, tail: Samples | None) -> tuple[Samples, Samples]:
        """A piece without its end, its beginning faded into the piece before; and its end, for the next."""
        if tail is not None:
            rise = np.linspace(0, 1, self.overlap, endpoint=False, dtype=np.float32)[:, None]
            voice[: self.overlap] = rise * voice[: self.overlap] + (1 - rise) * tail
        step = self.piece - self.overlap
        return voice[:step], voice[step:]

    def _voice(self, piece: Samples) -> Samples:
        sound = torch.from_numpy(np.ascontiguousarray(piece.T))
        spectra = torch.stft(
            sound, self._n_fft, HOP, window=self._window, center=True, return_complex=True
        )  # [2, n_fft / 2 + 1, frames]
        kept = torch.view_as_real(spectra[:, : self._bins]).permute(0, 3, 1, 2).clone()
        kept[:, :, :_LOWEST_BINS] = 0
        (found,) = self._session.run(None, {self._name: kept.reshape(1, 4, self._bins, -1).numpy()})
        parts = torch.from_numpy(np.ascontiguousarray(found)).reshape(2, 2, self._bins, -1)
        voice = torch.zeros_like(spectra)
        voice[:, : self._bins] = torch.complex(parts[:, 0], parts[:, 1])
        made = torch.istft(voice, self._n_fft, HOP, window=self._window, center=True, length=len(piece))
        result: Samples = made.T.numpy() * np.float32(self._compensation)
        return np.ascontiguousarray(result)


def separate_vocals(
    separator: VocalSeparator, recording: Path, output: Path, *, most_seconds: float = math.inf
) -> float:
    """Write the voice of a recording (any sound file, or a video with sound) as stereo WAV at 44.1 kHz; the
    seconds written.

    Raises:
        InputError: the recording cannot be read or is of more than `most_seconds`, or the output cannot be
            written.
    """
    refuse_source(output, recording)
    blocks = stream_sound(recording, SAMPLE_RATE, "stereo")
    return write_wav(output, separator.stream(blocks), SAMPLE_RATE, 2, most_seconds=most_seconds)
