"""Learn to write down spoken digits: Whisper's model trained in PyTorch, then the same weights on every backend.

    python examples/speech.py

A synthesiser speaks phrases of up to five digits, with many voices, speeds and pitches. The program trains the model,
tests it on voices and speeds that were held out, writes the same recordings down with the same weights on NumPy, JAX
and TensorFlow, and draws where the decoder listened for each word: `speech.png`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import listener
import numpy
import torch
import typer
from rich.progress import track
from speech_data import (
    BEGIN,
    END,
    FRAME_SECONDS,
    LONGEST,
    MELS,
    SPEAKERS,
    SYMBOLS,
    Batch,
    Recording,
    distorted,
    joined,
    record,
    spell,
)
from training import compared, console, subplots, train
from trees import BACKENDS, each

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SEED = 0
HELD_OUT = 500
EMBED, HEADS, FEED, BLOCKS = 64, 4, 256, 2
BATCH = 32
RATE = 3e-3


def recordings(part: str, count: int, seed: int) -> list[Recording]:
    """Let random speakers of a part of the split say random phrases."""
    rng = numpy.random.default_rng(seed)
    spoken = track(range(count), f"speaking, {part}", console=console)
    return [record(SPEAKERS[part], rng) for _ in spoken]


def batches(spoken: Sequence[Recording], rng: numpy.random.Generator) -> Iterator[Batch]:
    """Draw batches without end; recordings of similar lengths come together, so that little is padding."""
    while True:
        drawn = rng.integers(len(spoken), size=8 * BATCH)
        drawn = drawn[numpy.argsort([len(spoken[number].frames) for number in drawn])]
        for numbers in rng.permutation(drawn.reshape(8, BATCH)):
            yield distorted(joined([spoken[number] for number in numbers]), rng)


def read(params: dict[str, Any], batch: Batch) -> tuple[torch.Tensor, listener.Memory]:
    """Return the decoder's inputs in training: the embedded words, shifted by a place, and the encoder's states."""
    frames, lengths, words = (torch.from_numpy(array) for array in batch)
    memory = listener.encode(params, frames, lengths)
    before = torch.cat([torch.full_like(words[:, :1], BEGIN), words[:, :-1]], dim=1)
    return listener.embed(params, before), memory


def loss(params: dict[str, Any], batch: Batch) -> torch.Tensor:
    """Return the mean cross-entropy of each word after the words before it."""
    scores = listener.logits(params, listener.decode(params, *read(params, batch)))
    return torch.nn.functional.cross_entropy(scores.flatten(0, 1), torch.from_numpy(batch.words).flatten().long())


def initial() -> dict[str, Any]:
    """Make the initial parameters."""
    rng = numpy.random.default_rng(SEED)
    sizes = {"embed": EMBED, "heads": HEADS, "feed": FEED, "blocks": BLOCKS}
    return listener.initial(rng, MELS, len(SYMBOLS), LONGEST + 1, **sizes)


def write_down(params: dict[str, Any], heard: Batch, convert: Callable[[numpy.ndarray], Any]) -> numpy.ndarray:
    """Write recordings down with the backend of the arrays that `convert` makes."""
    weights, frames, lengths = each((params, heard.frames, heard.lengths), convert)
    return listener.greedy(weights, listener.encode(weights, frames, lengths), BEGIN, LONGEST + 1)


def word_errors(written: Sequence[str], spoken: Sequence[str]) -> int:
    """Count the words that must be replaced, inserted or deleted to turn one text into the other, at least."""
    costs = list(range(len(spoken) + 1))
    for number, word in enumerate(written, 1):
        row = [number]
        for column, other in enumerate(spoken):
            row.append(min(costs[column] + (word != other), costs[column + 1] + 1, row[-1] + 1))
        costs = row
    return costs[-1]


def error_rate(written: numpy.ndarray, spoken: numpy.ndarray) -> float:
    """Return the word error rate: the errors of all phrases, divided by the number of words that were spoken."""
    phrases = [(spell(ours).split(), spell(theirs).split()) for ours, theirs in zip(written, spoken, strict=True)]
    return sum(word_errors(*pair) for pair in phrases) / sum(len(words) for _, words in phrases)


def draw(params: dict[str, Any], recording: Recording, path: Path) -> None:
    """Draw a recording, and where the last block of the decoder listened for each word, in the mean over the heads."""
    single = joined([recording])
    words = [*spell(single.words[0]).split(), SYMBOLS[END]]
    tensors = each(params, torch.from_numpy)
    weights = listener.cross_weights(tensors, *read(tensors, single))[0].mean(0)[: len(words)].numpy()
    ends = len(recording.frames) * FRAME_SECONDS, weights.shape[1] * 2 * FRAME_SECONDS
    figure, (above, below) = subplots(2, 1, figsize=(8, 4.5), sharex=True)
    above.imshow(recording.frames.T, cmap="magma", origin="lower", aspect="auto", extent=(0, ends[0], 0, MELS))
    above.set_ylabel("mel band")
    below.imshow(weights, cmap="Blues", vmin=0, aspect="auto", extent=(0, ends[1], len(words) - 0.5, -0.5))
    below.set_yticks(range(len(words)), words)
    below.set_xlabel("seconds")
    for axis in (above, below):
        for begin in recording.starts:
            axis.axvline(begin, color="tab:orange", linewidth=1)
    figure.savefig(path, dpi=100)


def main(steps: int = 2500, spoken: int = 10000, picture: Path = Path("speech.png")) -> None:
    """Train, test, write down on every backend, and draw."""
    start = time.perf_counter()
    # The synthesiser's noise depends on all earlier phrases, so that the test, which comes first, is always the same.
    unheard = recordings("test", HELD_OUT, SEED + 1)
    drawn = batches(recordings("train", spoken, SEED), numpy.random.default_rng(SEED))
    params = train(initial(), lambda params: loss(params, next(drawn)), steps, RATE)
    asked = joined(unheard)
    written = {name: write_down(params, asked, convert) for name, convert in BACKENDS.items()}
    for words, ours in zip(asked.words[:5], written["torch"], strict=False):
        console.print(f"{spell(words):>30}  ->  {spell(ours)}", highlight=False)
    errors = error_rate(written["torch"], asked.words)
    console.print(f"{1 - errors:.2%} of the words right, by voices and at speeds that were held out")
    agree = compared(written, "written down")
    draw(params, max(unheard, key=lambda recording: len(recording.words)), picture)
    console.print(f"{picture}: shows where the decoder listened; {time.perf_counter() - start:.0f} s in total")
    if errors >= 0.05 or not agree:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
