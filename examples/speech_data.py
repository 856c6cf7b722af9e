"""The recordings of `speech.py`: phrases of digits, which the synthesiser eSpeak NG speaks, as log-mel frames.

The package espeakng-loader ships the library of eSpeak NG and its voices; no other program is needed. A speaker is an
accent, a variant of the voice, a speed and a pitch. `SPEAKERS` holds out variants and speeds for the test, which no
speaker of the training has. The split was fixed before the first training, and nothing was tuned on the test.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import espeakng_loader
import numpy

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "BEGIN",
    "END",
    "FRAME_SECONDS",
    "LONGEST",
    "MELS",
    "SPEAKERS",
    "SYMBOLS",
    "Batch",
    "Recording",
    "distorted",
    "joined",
    "log_mel",
    "record",
    "say",
    "spell",
]

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SYMBOLS = ("<end>", "<begin>", *WORDS)
"""The vocabulary; `<end>` also fills the rest of a phrase."""

END, BEGIN = 0, 1
LONGEST = 5
"""The largest number of words in a phrase."""

SAMPLE_RATE, WINDOW, HOP, MELS = 22050, 1024, 256, 40
FRAME_SECONDS = HOP / SAMPLE_RATE
QUIETEST = 6.0
"""What lies this many powers of ten under the loudest energy of a recording counts as silence."""

ACCENTS = ("en", "en-029", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-gb-x-rp", "en-us", "en-us-nyc")
SPEEDS = range(110, 260, 10)
"""Words per minute."""


class Speakers(NamedTuple):
    """The variants and the speeds of which a speaker is made."""

    variants: Sequence[str]
    speeds: Sequence[int]


def _split() -> dict[str, Speakers]:
    folder = Path(espeakng_loader.get_data_path(), "voices", "!v")
    names = sorted(path.name for path in folder.iterdir())
    variants = [names[number] for number in numpy.random.default_rng(0).permutation(len(names))]
    unheard, heard = SPEEDS[2::4], [speed for speed in SPEEDS if speed not in SPEEDS[2::4]]
    return {"train": Speakers(variants[20:], heard), "test": Speakers(variants[:20], unheard)}


SPEAKERS = _split()


class Recording(NamedTuple):
    """The frames (frames, MELS) of a phrase, its words, and the time in seconds at which each word begins."""

    frames: numpy.ndarray
    words: list[int]
    starts: list[float]


class Batch(NamedTuple):
    """Recordings as arrays: frames (count, length, MELS), silent at the end; lengths (count,); words, ended by END."""

    frames: numpy.ndarray
    lengths: numpy.ndarray
    words: numpy.ndarray


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("milliseconds", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("value", ctypes.c_uint64),
    )


_LAST, _WORD = 0, 1
"""The types of the event that ends a list of events, and of the beginning of a word."""
_SYNCHRONOUS, _CHARACTERS, _UTF8, _RATE, _PITCH = 2, 1, 1, 1, 3
"""Numbers of speak_lib.h."""
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
_SYNTH = [
    ctypes.c_char_p,
    ctypes.c_size_t,
    ctypes.c_uint,
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_void_p,
    ctypes.c_void_p,
]


class _Synthesiser:
    """The library, of which a process has a single instance, and the samples and word events of the last text."""

    def __init__(self) -> None:
        self.library: Any = ctypes.CDLL(espeakng_loader.get_library_path())
        self.library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        self.library.espeak_Synth.argtypes = _SYNTH
        self.parts: list[numpy.ndarray] = []
        self.starts: list[int] = []
        self._callback = _CALLBACK(self._collect)  # The library keeps a pointer to it, so it must live as long.
        path = str(espeakng_loader.get_data_path()).encode()
        if self.library.espeak_Initialize(_SYNCHRONOUS, 0, path, 0) != SAMPLE_RATE:
            raise RuntimeError(f"eSpeak NG must speak with {SAMPLE_RATE} samples per second.")
        self.library.espeak_SetSynthCallback(self._callback)
        self.library.espeak_ng_SetRandSeed(1)  # The breath of some voices is random.

    def _collect(self, samples: Any, count: int, events: Any) -> int:
        if count:
            self.parts.append(numpy.ctypeslib.as_array(samples, (count,)).copy())
        number = 0
        while events[number].type != _LAST:
            if events[number].type == _WORD:
                self.starts.append(events[number].sample)
            number += 1
        return 0


_synthesiser = cache(_Synthesiser)


def say(text: str, voice: str, speed: int, pitch: int) -> tuple[numpy.ndarray, list[float]]:
    """Speak a text; return its samples, between -1 and 1, and the time in seconds at which each word begins."""
    synthesiser = _synthesiser()
    library, encoded = synthesiser.library, text.encode()
    synthesiser.parts, synthesiser.starts = [], []
    library.espeak_SetParameter(_RATE, speed, 0)
    library.espeak_SetParameter(_PITCH, pitch, 0)
    if library.espeak_SetVoiceByName(voice.encode()):
        raise ValueError(f"eSpeak NG has no voice {voice!r}.")
    if library.espeak_Synth(encoded, len(encoded) + 1, 0, _CHARACTERS, 0, _UTF8, None, None):
        raise RuntimeError(f"eSpeak NG cannot say {text!r}.")
    samples = numpy.concatenate(synthesiser.parts).astype("float32") / 2**15
    return samples, [start / SAMPLE_RATE for start in synthesiser.starts]


@cache
def _filters() -> numpy.ndarray:
    """Return triangles over the frequencies of the transform, evenly spaced in mel: (1 + WINDOW / 2, MELS)."""
    hertz = numpy.linspace(0, SAMPLE_RATE / 2, 1 + WINDOW // 2)
    mel = 2595 * numpy.log10(1 + hertz / 700)
    corners = numpy.linspace(0, mel[-1], MELS + 2)
    rising = (mel[:, None] - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - mel[:, None]) / (corners[2:] - corners[1:-1])
    return numpy.maximum(0, numpy.minimum(rising, falling))


def log_mel(samples: numpy.ndarray) -> numpy.ndarray:
    """Return the log-mel frames (frames, MELS) of a recording, as Whisper does: from 0, silence, to 2, the loudest."""
    padded = numpy.pad(samples, WINDOW // 2)
    windows = numpy.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    energy = numpy.abs(numpy.fft.rfft(windows * numpy.hanning(WINDOW))) ** 2 @ _filters()
    logarithm = numpy.log10(numpy.maximum(energy, 1e-10))
    return (numpy.maximum(0, logarithm - logarithm.max() + QUIETEST) * (2 / QUIETEST)).astype("float32")


def phrase(words: Sequence[int]) -> str:
    """Return the text of a phrase, whose words are indices of SYMBOLS."""
    return " ".join(SYMBOLS[number] for number in words)


def spell(words: Sequence[int]) -> str:
    """Return the text before END."""
    numbers = list(words)
    return phrase(numbers[: numbers.index(END)] if END in numbers else numbers)


def record(speakers: Speakers, rng: numpy.random.Generator) -> Recording:
    """Let a random speaker say a random phrase."""
    words = rng.integers(2, len(SYMBOLS), size=rng.integers(1, LONGEST + 1)).tolist()
    accent, variant = (str(rng.choice(names)) for names in (ACCENTS, speakers.variants))
    speed, pitch = int(rng.choice(speakers.speeds)), int(rng.integers(30, 71))
    samples, starts = say(phrase(words), f"{accent}+{variant}", speed, pitch)
    return Recording(log_mel(samples), words, starts)


def distorted(batch: Batch, rng: numpy.random.Generator) -> Batch:
    """Make each recording harder: shift its bands, as another throat would, and silence some bands and some frames.

    The silence is that of SpecAugment (Park et al. 2019).
    """
    count, length, mels = batch.frames.shape
    bands = numpy.clip(numpy.arange(mels) + rng.integers(-2, 3, size=(count, 1, 1)), 0, mels - 1)
    frames = numpy.take_along_axis(batch.frames, bands, axis=2)
    silent = _stretches(rng, count, mels, 8)[:, None, :] | _stretches(rng, count, length, 6)[:, :, None]
    return batch._replace(frames=frames * ~silent)


def _stretches(rng: numpy.random.Generator, count: int, size: int, longest: int) -> numpy.ndarray:
    """Choose a random stretch of at most `longest` positions out of `size` in each row: (count, size), boolean."""
    width = rng.integers(longest + 1, size=(count, 1))
    first = rng.integers(numpy.maximum(size - width, 0) + 1)
    return (numpy.arange(size) >= first) & (numpy.arange(size) < first + width)


def joined(recordings: Sequence[Recording]) -> Batch:
    """Pad frames and words to the longest; a silent frame follows each recording, so that the padding has no effect."""
    lengths = numpy.asarray([len(recording.frames) for recording in recordings], dtype=numpy.int32)
    frames = numpy.zeros((len(recordings), lengths.max() + 1, MELS), dtype=numpy.float32)
    words = numpy.full((len(recordings), LONGEST + 1), END, dtype=numpy.int32)
    for number, recording in enumerate(recordings):
        frames[number, : len(recording.frames)] = recording.frames
        words[number, : len(recording.words)] = recording.words
    return Batch(frames, lengths, words)
