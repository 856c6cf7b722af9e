"""Learn to read dates: an encoder-decoder trained in PyTorch, then the same weights on every backend.

    python examples/dates.py

"wednesday 3 mar 2021" becomes "2021-03-03". The program trains the model, tests it on days that were held out,
translates them again with the same weights on NumPy, JAX and TensorFlow, and draws where the decoder looked:
`dates.png`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
import transformer
import typer
from dates_data import BEGIN, SYMBOLS, TARGET_LENGTH, Pairs, pairs, spell, split
from training import compared, console, subplots, train
from trees import BACKENDS, each

if TYPE_CHECKING:
    from collections.abc import Callable

SEED = 0
HELD_OUT = 2000
EMBED, HEADS, FEED, BLOCKS = 64, 4, 128, 2
BATCH = 64
RATE = 3e-3


def read(params: dict[str, Any], batch: Pairs) -> tuple[torch.Tensor, transformer.Memory]:
    """Return the decoder's inputs in training: the embedded target, shifted by a place, and the encoder's states."""
    source, lengths, target = (torch.from_numpy(array) for array in batch)
    memory = transformer.encode(params, transformer.embed(params, source), lengths)
    before = torch.cat([torch.full_like(target[:, :1], BEGIN), target[:, :-1]], dim=1)
    return transformer.embed(params, before), memory


def loss(params: dict[str, Any], batch: Pairs) -> torch.Tensor:
    """Return the mean cross-entropy of each symbol after the symbols before it."""
    scores = transformer.logits(params, transformer.decode(params, *read(params, batch)))
    return torch.nn.functional.cross_entropy(scores.flatten(0, 1), torch.from_numpy(batch.target).flatten().long())


def learn(steps: int) -> dict[str, Any]:
    """Train on random days, each written in a random format."""
    rng = numpy.random.default_rng(SEED)
    days, _ = split(SEED, HELD_OUT)
    first = transformer.initial(rng, len(SYMBOLS), EMBED, HEADS, FEED, BLOCKS)
    return train(first, lambda params: loss(params, pairs(days, rng, BATCH)), steps, RATE)


def translate(params: dict[str, Any], asked: Pairs, convert: Callable[[numpy.ndarray], Any]) -> numpy.ndarray:
    """Translate with the backend of the arrays that `convert` makes."""
    weights, source, lengths = each((params, asked.source, asked.source_lengths), convert)
    memory = transformer.encode(weights, transformer.embed(weights, source), lengths)
    return transformer.greedy(weights, memory, BEGIN, TARGET_LENGTH)


def draw(params: dict[str, Any], asked: Pairs, path: Path) -> None:
    """Draw the cross-attention of the last block, one picture for each head: where each written character looked."""
    first = Pairs(*(array[:1] for array in asked))
    written, iso = spell(first.source[0]), spell(first.target[0])
    tensors = each(params, torch.from_numpy)
    weights = transformer.cross_weights(tensors, *read(tensors, first))[0, :, :, : len(written)].numpy()
    figure, axes = subplots(1, len(weights), figsize=(4 * len(weights), 3), sharey=True)
    for head, (axis, head_weights) in enumerate(zip(axes, weights, strict=True)):
        axis.imshow(head_weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(written)), list(written))
        axis.set_yticks(range(len(iso)), list(iso))
        axis.set_title(f"head {head}")
    figure.savefig(path, dpi=120)


def main(steps: int = 1000, picture: Path = Path("dates.png")) -> None:
    """Train, test, translate on every backend, and draw."""
    start = time.perf_counter()
    params = learn(steps)
    _, unseen = split(SEED, HELD_OUT)
    asked = pairs(unseen, numpy.random.default_rng(SEED + 1))
    translated = {name: translate(params, asked, convert) for name, convert in BACKENDS.items()}
    right = (translated["torch"] == asked.target).all(axis=1)
    for row in range(5):
        console.print(f"{spell(asked.source[row]):>26}  ->  {spell(translated['torch'][row])}", highlight=False)
    console.print(f"{right.sum()} of {right.size} unseen days exact: {right.mean():.2%}")
    agree = compared(translated, "translated")
    draw(params, asked, picture)
    console.print(f"{picture}: shows where the decoder looked; {time.perf_counter() - start:.0f} s in total")
    if right.mean() <= 0.99 or not agree:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
