"""The speech example: its recordings, its training in few steps, and its decoding on every backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import listener
import numpy
import pytest
import speech
import speech_data
import typer
from matplotlib import image
from support.comparisons import assert_near
from trees import BACKENDS, each, leaves

from mha_spec.arrays import library_of

if TYPE_CHECKING:
    from pathlib import Path

    import torch

MELS, SYMBOLS, LONGEST = 5, 11, 7


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    """Make small random parameters, biases and gains too; small embeddings, so that the last symbol is not repeated."""
    rng = numpy.random.default_rng(4)
    sizes = {"embed": 12, "heads": 3, "feed": 13, "blocks": 2}
    first = listener.initial(rng, MELS, SYMBOLS, LONGEST, **sizes)
    drawn = each(first, lambda array: rng.standard_normal(array.shape, dtype="float32"))
    return {**drawn, "embedding": drawn["embedding"] / 10}


@pytest.fixture(scope="module")
def heard() -> speech_data.Batch:
    """Draw frames of recordings of several lengths; the words are not read."""
    frames = numpy.random.default_rng(4).standard_normal((4, 30, MELS), dtype="float32")
    lengths = numpy.asarray([29, 2, 17, 1], "int32")
    frames *= (numpy.arange(30) < lengths[:, None])[:, :, None]
    return speech_data.Batch(frames, lengths, numpy.zeros((4, 1), "int32"))


def test_a_phrase_is_spoken_and_becomes_frames() -> None:
    slow, starts = speech_data.say("three seven two", "en-us+f3", 130, 50)
    fast, _ = speech_data.say("three seven two", "en-us+f3", 250, 50)
    assert slow.dtype == numpy.float32
    assert 0.1 < abs(slow).max() <= 1
    assert len(starts) == 3
    assert starts == sorted(set(starts))
    assert starts[-1] < len(slow) / speech_data.SAMPLE_RATE
    assert len(fast) < 0.8 * len(slow)
    frames = speech_data.log_mel(slow)
    assert frames.shape == (1 + len(slow) // speech_data.HOP, speech_data.MELS)
    assert (frames.min(), frames.max()) == (0, 2)


def test_a_band_of_the_frames_is_the_pitch_of_a_tone() -> None:
    time = numpy.arange(speech_data.SAMPLE_RATE) / speech_data.SAMPLE_RATE
    loudest = [speech_data.log_mel(numpy.sin(2 * numpy.pi * hertz * time))[40].argmax() for hertz in (300, 1000, 4000)]
    mels = 2595 * numpy.log10(1 + numpy.asarray([300, 1000, 4000, speech_data.SAMPLE_RATE / 2]) / 700)
    numpy.testing.assert_allclose(loudest, mels[:3] / mels[3] * (speech_data.MELS + 1) - 1, atol=0.6)


def test_an_unknown_voice_is_an_error() -> None:
    with pytest.raises(ValueError, match="no voice 'xx-nowhere'"):
        speech_data.say("one", "xx-nowhere", 150, 50)


def test_no_voice_and_no_speed_is_heard_in_both_parts() -> None:
    train, test = speech_data.SPEAKERS["train"], speech_data.SPEAKERS["test"]
    assert not set(train.variants) & set(test.variants)
    assert not set(train.speeds) & set(test.speeds)
    assert (len(train.variants), len(test.variants)) == (84, 20)


def test_recordings_are_joined() -> None:
    recorded = speech.recordings("test", 7, 5)
    batch = speech_data.joined(recorded)
    assert batch.frames.shape == (7, batch.lengths.max() + 1, speech_data.MELS)
    for recording, frames, length, words in zip(recorded, *batch, strict=True):
        numpy.testing.assert_array_equal(frames[:length], recording.frames)
        assert not frames[length:].any()
        assert speech_data.spell(words) == speech_data.phrase(recording.words)
        assert len(recording.starts) == len(recording.words)


def test_the_loss_falls() -> None:
    rng = numpy.random.default_rng(6)
    drawn = next(speech.batches(speech.recordings("train", 40, 6), rng))
    losses: list[float] = []

    def loss(params: dict[str, Any]) -> torch.Tensor:
        losses.append(float((value := speech.loss(params, drawn)).detach()))
        return value

    trained = speech.train(speech.initial(), loss, 12, speech.RATE)
    assert losses[0] > 2
    assert losses[-1] < losses[0] / 1.5
    assert {library_of(array) for array in leaves(trained)} == {"numpy"}


def test_padding_changes_nothing(params: dict[str, Any], heard: speech_data.Batch) -> None:
    weights, frames = each((params, heard.frames), lambda array: array.astype("float64"))
    together = listener.encode(weights, frames, heard.lengths).states
    for row, length in enumerate(heard.lengths):
        alone = listener.encode(weights, frames[row : row + 1, : length + length % 2]).states
        assert alone.shape == (1, (length + 1) // 2, 12)
        assert_near(together[row, : alone.shape[1]], alone[0])


def without_cache(params: dict[str, Any], heard: speech_data.Batch) -> numpy.ndarray:
    """Decode greedily, with the whole phrase again in each step."""
    memory = listener.encode(params, heard.frames, heard.lengths)
    words = numpy.full((len(heard.frames), 1), speech_data.BEGIN)
    for _ in range(LONGEST):
        scores = listener.logits(params, listener.decode(params, listener.embed(params, words), memory))
        words = numpy.concatenate([words, scores[:, -1:].argmax(-1)], axis=1)
    return words[:, 1:]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_writes_the_same_words_with_a_cache(
    params: dict[str, Any], heard: speech_data.Batch, backend: str
) -> None:
    weights, frames, lengths = each((params, heard.frames, heard.lengths), BACKENDS[backend])
    written = listener.greedy(weights, listener.encode(weights, frames, lengths), speech_data.BEGIN, LONGEST)
    expected = without_cache(params, heard)
    assert len({tuple(row) for row in expected}) == len(expected)
    assert len(set(expected.flat)) > 3
    numpy.testing.assert_array_equal(written, expected)


def test_distorted_recordings_keep_their_shape_and_lose_little() -> None:
    rng = numpy.random.default_rng(8)
    ramp = numpy.broadcast_to(numpy.arange(1, 14, dtype="float32"), (200, 23, 13))
    batch = speech_data.Batch(ramp, numpy.full(200, 23, "int32"), numpy.zeros((200, 1), "int32"))
    frames, *rest = speech_data.distorted(batch, rng)
    assert (frames.shape, frames.dtype) == (ramp.shape, ramp.dtype)
    assert [id(array) for array in rest] == [id(batch.lengths), id(batch.words)]
    shift = (frames - ramp)[frames > 0]
    assert (shift.min(), shift.max()) == (-2, 2)
    silent = frames == 0
    assert silent.all(1).sum(1).max() == 8
    assert silent.all(2).sum(1).max() == 6


@pytest.mark.parametrize(
    ("written", "spoken", "errors"),
    [
        ("one two", "one two", 0),
        ("", "one two", 2),
        ("one", "", 1),
        ("one three", "one two three", 1),
        ("two one", "one two", 2),
        ("nine one two", "one two four", 2),
        ("four two", "one two", 1),
    ],
)
def test_wrong_words_are_counted(written: str, spoken: str, errors: int) -> None:
    assert speech.word_errors(written.split(), spoken.split()) == errors


def test_the_error_rate_is_that_of_words() -> None:
    spoken = numpy.asarray([[2, 3, 4, 0], [5, 0, 0, 0]])
    assert speech.error_rate(spoken, spoken) == 0
    assert speech.error_rate(numpy.asarray([[2, 4, 0, 0], [6, 0, 9, 0]]), spoken) == 2 / 4


def test_the_picture_shows_the_frames_the_weights_and_the_beginnings_of_words(tmp_path: Path) -> None:
    def drawn(params: dict[str, Any], recording: speech_data.Recording) -> list[numpy.ndarray]:
        """Return the upper part of the picture, which has the frames, and the lower part, which has the weights."""
        speech.draw(params, recording, tmp_path / "speech.png")
        above, _, _, below = numpy.array_split(image.imread(tmp_path / "speech.png"), 4)
        return [above, below]

    (recording,) = speech.recordings("test", 1, 7)
    first = speech.initial()
    others = first | {"decoder": first["decoder"][::-1]}
    frames, weights = drawn(first, recording)
    assert frames.size > 10**5
    for params, other, expected in (
        (others, recording, [False, True]),
        (first, recording._replace(frames=recording.frames[::-1]), [True, True]),
        (first, recording._replace(starts=[start + 0.05 for start in recording.starts]), [True, True]),
    ):
        above, below = drawn(params, other)
        assert [bool((above != frames).any()), bool((below != weights).any())] == expected


def test_the_program_fails_if_too_few_words_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speech, "HELD_OUT", 7)
    with pytest.raises(typer.Exit):
        speech.main(steps=2, spoken=11, picture=tmp_path / "speech.png")
    assert (tmp_path / "speech.png").exists()
    assert capsys.readouterr().out.count("7 of 7 written down as on PyTorch") == 4
