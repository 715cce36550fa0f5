"""Voices for puppets: sentences spoken by eSpeak NG, with voices set apart for evaluation.

The synthesiser comes with pip (`espeakng-loader`); nothing needs a system package. Its output belongs to
whoever runs it, whatever its own licence. Evaluation clips use the fixed recordings in
`stableavatar/assets/evaluation` instead.
"""

from __future__ import annotations

import _ctypes
import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stableavatar.data.puppets.identity import EVALUATION_SEED
from stableavatar.data.puppets.sentences import draw_sentence
from stableavatar.errors import InputError

SAMPLE_RATE = 16_000
Samples = NDArray[np.float32]

_LANGUAGES = {
    "en-us": 0.2, "en": 0.12, "en-gb-x-rp": 0.08, "en-gb-scotland": 0.06, "en-029": 0.04, "de": 0.05,
    "fr": 0.04, "es": 0.05, "it": 0.05, "pt-br": 0.04, "nl": 0.03, "sv": 0.03, "pl": 0.03, "cmn": 0.06,
    "tr": 0.02, "fi": 0.02, "id": 0.03, "sw": 0.02, "hi": 0.03,
}  # fmt: skip
"""eSpeak languages and how often each speaks."""
TRAINING_VARIANTS = {
    "man": (
        "m1", "m2", "m3", "m5", "m6", "m7", "klatt", "klatt2", "klatt3", "Alex", "Andy", "Denis",
        "Gene", "Gene2", "Lee", "Michael", "Mike", "Reed", "adam", "antonio", "benjamin", "boris",
        "caleb", "david", "ed", "edward", "gustave", "ian", "john", "max", "michel", "miguel",
        "pablo", "paul", "pedro", "quincy", "rob", "victor", "zac",
    ),
    "woman": (
        "f1", "f2", "f3", "f4", "Alicia", "Andrea", "Annie", "anika", "aunty", "belinda",
        "grandma", "steph", "steph2",
    ),
}  # fmt: skip
UNSEEN_VARIANTS = {
    "man": ("m4", "m8", "klatt4", "Marco", "Mario", "Hugo", "Henrique", "robert", "travis", "marcelo"),
    "woman": ("f5", "linda", "shelby", "steph3"),
}

_CHARS_UTF8 = 1
_PARAMETER_RATE = 1
_PARAMETER_PITCH = 3
_PARAMETER_RANGE = 4
_RETRIEVAL = 2
_PHASES = 512


@dataclass(frozen=True)
class Voice:
    """A speaker: eSpeak language and variant, words a minute, pitch and its range (0..99), and a resampling
    factor that shifts pitch and formants together (1 = as synthesised)."""

    language: str
    variant: str
    rate: int
    pitch: int
    pitch_range: int
    shift: float


def draw_voice(rng: np.random.Generator, person: str, unseen: bool = False) -> Voice:
    """A random voice for a "man" or "woman"; `unseen` picks from the variants kept for evaluation."""
    variants = (UNSEEN_VARIANTS if unseen else TRAINING_VARIANTS)[person]
    shares = np.asarray(list(_LANGUAGES.values()))
    return Voice(
        language=str(rng.choice(list(_LANGUAGES), p=shares / shares.sum())),
        variant=str(rng.choice(variants)),
        rate=int(rng.integers(125, 215)),
        pitch=int(rng.integers(25, 75)),
        pitch_range=int(rng.integers(25, 85)),
        shift=float(np.exp(rng.normal(0, 0.07))),
    )


class _Engine:
    """One loaded copy of the library. eSpeak keeps hidden state between utterances, so each recording gets a
    new copy: the same voice and text then always give the same samples."""

    def __init__(self) -> None:
        try:
            import espeakng_loader  # type: ignore[import-untyped]
        except ImportError as error:
            raise InputError(
                "Training clips need a speech synthesiser, which is not installed. "
                "Install it: pip install espeakng-loader"
            ) from error
        self._pieces: list[NDArray[np.int16]] = []
        try:
            self._library: Any = ctypes.CDLL(str(espeakng_loader.get_library_path()))
        except OSError as error:
            raise InputError(f"The eSpeak NG library of espeakng-loader does not load: {error}.") from error
        data = str(espeakng_loader.get_data_path()).encode()
        self.sample_rate = int(self._library.espeak_Initialize(_RETRIEVAL, 0, data, 1 << 15))
        if self.sample_rate <= 0:
            raise InputError(
                f"eSpeak NG does not start with its data in {data.decode()}; reinstall espeakng-loader."
            )
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

        def receive(wave: Any, count: int, _events: object) -> int:
            if wave and count > 0:
                self._pieces.append(np.ctypeslib.as_array(wave, (count,)).astype(np.int16))
            return 0

        self._callback: Callable[..., int] = kind(receive)
        self._library.espeak_SetSynthCallback(self._callback)

    def say(self, voice: Voice, text: str) -> Samples:
        self._pieces.clear()
        name = f"{voice.language}+{voice.variant}"
        if self._library.espeak_SetVoiceByName(name.encode()) != 0:
            raise InputError(f"eSpeak NG has no voice {name!r}; reinstall espeakng-loader.")
        self._library.espeak_SetParameter(_PARAMETER_RATE, voice.rate, 0)
        self._library.espeak_SetParameter(_PARAMETER_PITCH, voice.pitch, 0)
        self._library.espeak_SetParameter(_PARAMETER_RANGE, voice.pitch_range, 0)
        data = text.encode() + b"\0"
        self._library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 1, 0, _CHARS_UTF8, None, None)
        if not self._pieces:
            return np.zeros(0, dtype=np.float32)
        return np.concatenate(self._pieces).astype(np.float32) / 32768.0

    def close(self) -> None:
        self._library.espeak_Terminate()
        handle = self._library._handle
        del self._library
        if sys.platform == "win32":
            _ctypes.FreeLibrary(handle)
        else:
            _ctypes.dlclose(handle)


def resample(samples: Samples, ratio: float) -> Samples:
    """Linear-phase resampling to `ratio` times as many samples (0.2 to 4), by a windowed sinc."""
    cutoff = min(1.0, ratio)
    reach = int(np.ceil(10 / cutoff))
    offsets = np.arange(-reach + 1, reach + 1)
    phases = np.arange(_PHASES + 1) / _PHASES
    distance = offsets[None, :] - phases[:, None]
    kernels = (
        cutoff * np.sinc(cutoff * distance) * np.cos(0.5 * np.pi * np.clip(distance / reach, -1, 1)) ** 2
    )
    position = np.arange(int(len(samples) * ratio)) / ratio
    base = np.floor(position).astype(np.int64)
    phase = np.rint((position - base) * _PHASES).astype(np.int64)
    padded = np.pad(samples, (reach, 2 * reach)).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach)
    return np.einsum("nk,nk->n", windows[base + 1], kernels.astype(np.float32)[phase]).astype(np.float32)


def synthesise(voice: Voice, phrases: list[str]) -> list[Samples]:
    """Speak each phrase: float32 mono at 16 kHz, silence at both ends trimmed. Deterministic.

    Raises:
        InputError: `espeakng-loader` is missing or broken.
    """
    engine = _Engine()
    try:
        spoken = [engine.say(voice, phrase) for phrase in phrases]
        rate = engine.sample_rate
    finally:
        engine.close()
    result = []
    for samples in spoken:
        loud = np.flatnonzero(np.abs(samples) > 0.004)
        trimmed = samples[loud[0] : loud[-1] + 1] if len(loud) else samples
        result.append(resample(trimmed, SAMPLE_RATE / rate / voice.shift))
    return result


def _colour(rng: np.random.Generator, samples: Samples, quiet_share: float) -> Samples:
    """A recording's circumstances: equaliser, a small room, background noise, level."""
    spectrum = np.fft.rfft(samples, n=len(samples) + 4000)
    frequencies = np.fft.rfftfreq(len(samples) + 4000, 1 / SAMPLE_RATE)
    octaves = np.log2(np.maximum(frequencies, 60) / 1000)
    curve = rng.normal(0, 1.6) * octaves + 3 * rng.normal() * np.sin(
        octaves * rng.uniform(0.8, 2) + rng.uniform(0, 6)
    )
    spectrum *= 10 ** (np.clip(curve, -14, 10) / 20)
    if rng.uniform() < 0.4:
        tail = int(rng.uniform(0.03, 0.15) * SAMPLE_RATE)
        room = rng.standard_normal(tail) * np.exp(-5 * np.arange(tail) / tail)
        room *= rng.uniform(0.1, 0.45) / np.sqrt((room**2).sum())
        room[0] = 1.0
        spectrum *= np.fft.rfft(room, n=len(samples) + 4000)
    shaped = np.fft.irfft(spectrum)[: len(samples)]
    shaped /= max(float(np.abs(shaped).max()), 1e-6)
    if rng.uniform() < 0.6:
        noise = rng.standard_normal(len(samples))
        if rng.uniform() < 0.6:
            noise = np.cumsum(noise)
            noise -= np.convolve(noise, np.ones(801) / 801, mode="same")
        noise /= max(float(noise.std()), 1e-9)
        shaped += noise * float(np.sqrt((shaped**2).mean()) * 10 ** (-rng.uniform(24, 50) / 20))
    level = rng.uniform(0.03, 0.2) if rng.uniform() < quiet_share else rng.uniform(0.2, 0.95)
    return (shaped * level / max(float(np.abs(shaped).max()), 1e-6)).astype(np.float32)


def _arrange(rng: np.random.Generator, phrases: list[Samples], length: int, long_pause: bool) -> Samples:
    track = np.zeros(length, dtype=np.float32)
    position = int(rng.uniform(0.1, 0.45) * SAMPLE_RATE)
    pause_at = int(rng.integers(0, 2)) if long_pause else -1
    for index, phrase in enumerate(phrases):
        if index == pause_at:
            position += int(rng.uniform(1.0, 1.5) * SAMPLE_RATE)
        if position >= length:
            break
        part = phrase[: length - position]
        track[position : position + len(part)] = part
        position += len(part) + int(rng.uniform(0.12, 0.6) * SAMPLE_RATE)
    return track


def training_speech(seed: int, seconds: float, person: str = "man") -> Samples:
    """Speech for a training clip: float32 [seconds * 16000], phrases with pauses; one clip in four is silent
    for at least a second somewhere. Deterministic in its arguments.

    Raises:
        InputError: `seed` is an evaluation seed, or the synthesiser is missing.
    """
    if seed >= EVALUATION_SEED:
        raise InputError(
            f"Seed {seed} is for evaluation (from {EVALUATION_SEED} on); training voices must not meet it."
        )
    rng = np.random.default_rng([seed, 808])
    voice = draw_voice(rng, person)
    return _speak(rng, voice, seconds, unseen=False)


def unseen_speech(seed: int, seconds: float, person: str = "man") -> Samples:
    """Like :func:`training_speech` with voices and sentences that no training clip uses."""
    rng = np.random.default_rng([seed, 809])
    return _speak(rng, draw_voice(rng, person, unseen=True), seconds, unseen=True)


def _speak(rng: np.random.Generator, voice: Voice, seconds: float, unseen: bool) -> Samples:
    length = round(seconds * SAMPLE_RATE)
    count = max(2, int(np.ceil(seconds / 1.3)))
    phrases = synthesise(voice, [draw_sentence(rng, voice.language, unseen) for _ in range(count)])
    long_pause = bool(rng.uniform() < 0.25)
    return _colour(rng, _arrange(rng, phrases, length, long_pause), quiet_share=0.2)
