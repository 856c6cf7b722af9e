"""Read handwritten digits: a Vision Transformer trained in PyTorch, then the same weights on every backend.

    python examples/vision.py

The digits of scikit-learn are images of 8 by 8 pixels, which the model cuts into 16 patches. The program trains the
model, tests it on images that were held out, classifies them again with the same weights on NumPy, JAX and TensorFlow,
and draws the patches to which the class token attends: `vision.png`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch
import typer
import vision_transformer
from sklearn.datasets import load_digits
from torch.nn.functional import affine_grid, cross_entropy, grid_sample
from training import compared, console, subplots, train
from trees import BACKENDS, each

if TYPE_CHECKING:
    from collections.abc import Callable

SPLIT, HELD_OUT = 0, 360
"""The seed of the split, which no option changes, and the number of images to test on."""
SIDE, PATCH, CLASSES = 8, 2, 10
EMBED, HEADS, FEED, BLOCKS = 64, 4, 128, 2
BATCH = 64
RATE = 3e-3
DISTORTION = 0.1
"""The standard deviation of the numbers that move, turn and stretch an image in training."""


class Digits(NamedTuple):
    """Images (count, height, width, 1) with ink between 0 and 1, and their classes (count,)."""

    images: numpy.ndarray
    classes: numpy.ndarray


def split() -> tuple[Digits, Digits]:
    """Return the digits to train on, and those that are held out."""
    pixels, classes = load_digits(return_X_y=True)
    images = (pixels / 16).astype("float32").reshape(-1, SIDE, SIDE, 1)
    order = numpy.random.default_rng(SPLIT).permutation(len(images))
    held_out, seen = order[:HELD_OUT], order[HELD_OUT:]
    return Digits(images[seen], classes[seen]), Digits(images[held_out], classes[held_out])


def distorted(images: torch.Tensor, rng: numpy.random.Generator) -> torch.Tensor:
    """Move, turn and stretch each image a little, by a random affine map."""
    maps = numpy.eye(2, 3) + DISTORTION * rng.standard_normal((len(images), 2, 3))
    channels_first = images.movedim(3, 1)
    grid = affine_grid(torch.from_numpy(maps).float(), list(channels_first.shape), align_corners=False)
    return grid_sample(channels_first, grid, align_corners=False).movedim(1, 3)


def loss(params: dict[str, Any], digits: Digits, rng: numpy.random.Generator) -> torch.Tensor:
    """Return the mean cross-entropy of a random batch."""
    chosen = rng.integers(len(digits.images), size=BATCH)
    images = distorted(torch.from_numpy(digits.images[chosen]), rng)
    return cross_entropy(vision_transformer.logits(params, images), torch.from_numpy(digits.classes[chosen]))


def learn(digits: Digits, steps: int, seed: int) -> dict[str, Any]:
    """Train on distorted images."""
    rng = numpy.random.default_rng(seed)
    first = vision_transformer.initial(
        rng, PATCH, (SIDE // PATCH) ** 2, CLASSES, embed=EMBED, heads=HEADS, feed=FEED, blocks=BLOCKS
    )
    return train(first, lambda params: loss(params, digits, rng), steps, RATE)


def classify(params: dict[str, Any], images: numpy.ndarray, convert: Callable[[numpy.ndarray], Any]) -> numpy.ndarray:
    """Return the most likely class of each image, by the backend of the arrays that `convert` makes."""
    scores = vision_transformer.logits(*each((params, images), convert))
    return numpy.asarray(scores).argmax(axis=1)


def draw(params: dict[str, Any], digits: Digits, path: Path) -> None:
    """Draw the first image of each class, and for each head of the last block where the class token looks."""
    present, firsts = numpy.unique(digits.classes, return_index=True)
    images = digits.images[firsts]
    weights = vision_transformer.class_attention(params, images).reshape(len(images), -1, SIDE // PATCH, SIDE // PATCH)
    rows, columns = 1 + weights.shape[1], len(images)
    figure, axes = subplots(rows, columns, figsize=(columns, rows), squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for column, (digit, image) in enumerate(zip(present, images, strict=True)):
        axes[0, column].set_title(str(digit))
        for axis in axes[:, column]:
            axis.imshow(image[:, :, 0], cmap="gray_r", extent=(0, SIDE, SIDE, 0))
        for axis, looked in zip(axes[1:, column], weights[column], strict=True):
            axis.imshow(looked, cmap="Oranges", alpha=0.65, extent=(0, SIDE, SIDE, 0), vmin=0, vmax=looked.max())
    for head, axis in enumerate(axes[1:, 0]):
        axis.set_ylabel(f"head {head}")
    figure.savefig(path, dpi=100)


def main(steps: int = 2000, seed: int = 0, picture: Path = Path("vision.png")) -> None:
    """Train, test, classify on every backend, and draw; another seed gives other initial weights, not another split."""
    start = time.perf_counter()
    seen, held_out = split()
    params = learn(seen, steps, seed)
    classified = {name: classify(params, held_out.images, convert) for name, convert in BACKENDS.items()}
    right = classified["torch"] == held_out.classes
    console.print(f"{right.sum()} of {right.size} held-out digits right: {right.mean():.2%}")
    agree = compared(classified, "classified")
    draw(params, held_out, picture)
    console.print(f"{picture}: shows where the class token looks; {time.perf_counter() - start:.0f} s in total")
    if right.mean() <= 0.97 or not agree:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
