"""The example that reads digits: a few steps of training, the classes on every backend, and the picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch
import typer
import vision
import vision_transformer
from matplotlib import image
from support.comparisons import assert_equal, assert_near
from support.numbers import numbers
from training import compared
from trees import BACKENDS, each

import mha_spec
from mha_spec.arrays import library_of

if TYPE_CHECKING:
    from pathlib import Path

EMBED, HEADS, FEED, BLOCKS = 14, 2, 11, 3


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    """Make random weights that are not small."""
    rng = numpy.random.default_rng(7)
    sizes = {"embed": EMBED, "heads": HEADS, "feed": FEED, "blocks": BLOCKS}
    first = vision_transformer.initial(rng, vision.PATCH, 16, vision.CLASSES, **sizes)
    return each(first, lambda array: rng.standard_normal(array.shape).astype("float32"))


def test_the_split_is_fixed_and_shares_no_image() -> None:
    (seen, classes), held_out = vision.split()
    assert len(held_out.images) == len(held_out.classes) == 360
    assert len(seen) + 360 == len(classes) + 360 == 1797
    assert seen.shape[1:] == held_out.images.shape[1:] == (8, 8, 1)
    assert not {image.tobytes() for image in seen} & {image.tobytes() for image in held_out.images}
    assert_equal(vision.split(), ((seen, classes), held_out))


def test_a_distorted_image_has_the_same_ink_elsewhere() -> None:
    image = numpy.zeros((500, 8, 8, 1), "float32")
    image[:, 3:5, 3:5] = 1
    moved = vision.distorted(torch.from_numpy(image), numpy.random.default_rng(7)).numpy()
    assert moved.shape == image.shape
    assert moved.dtype == numpy.float32
    ink = moved.sum(axis=(1, 2, 3))
    assert abs(ink.mean() - 4) < ink.std()
    assert len(numpy.unique(moved, axis=0)) == 500


def test_the_loss_falls() -> None:
    seen, held_out = vision.split()
    losses = {}
    for steps in (1, 60):
        params = each(vision.learn(seen, steps, seed=7), torch.from_numpy)
        losses[steps] = float(vision.loss(params, held_out, numpy.random.default_rng(7)))
    assert losses[1] == pytest.approx(numpy.log(vision.CLASSES), rel=0.1)
    assert losses[60] < numpy.log(vision.CLASSES / 2)


def test_every_backend_gives_the_same_classes(params: dict[str, Any]) -> None:
    images = numbers(50, 8, 8, 1, dtype="float32")
    classes = {name: vision.classify(params, images, convert) for name, convert in BACKENDS.items()}
    assert len(set(classes["torch"])) > 2
    for name, convert in BACKENDS.items():
        assert (library_of(convert(images)) or "numpy") == name
        assert_equal(classes[name], classes["torch"])


def test_the_drawn_weights_are_those_of_the_last_block(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    params, images = each((params, vision.split()[1].images[:5]), lambda array: array.astype("float64"))
    calls: list[numpy.ndarray] = []

    def recorded(x: numpy.ndarray, key: numpy.ndarray, value: numpy.ndarray, weights: Any, **options: Any) -> Any:
        calls.append(mha_spec.multi_head_attention_weights(x, key, weights))
        return attend(x, key, value, weights, **options)

    attend = mha_spec.multi_head_attention
    monkeypatch.setattr(mha_spec, "multi_head_attention", recorded)
    vision_transformer.logits(params, images)
    *_, last = calls
    assert last.shape == (5, HEADS, 17, 17)
    assert len(calls) == BLOCKS
    assert_near(vision_transformer.class_attention(params, images), last[:, :, 0, 1:])


def test_the_picture_shows_the_digits_and_the_weights(params: dict[str, Any], tmp_path: Path) -> None:
    def drawn(weights: dict[str, Any], digits: vision.Digits) -> numpy.ndarray:
        vision.draw(weights, digits, tmp_path / "vision.png")
        return image.imread(tmp_path / "vision.png")

    digits = vision.split()[1]
    first = drawn(params, digits)
    height, width, _ = first.shape
    assert width > 2 * height > 200
    numpy.testing.assert_array_equal(first, drawn(params, digits))
    others = params | {"encoder": params["encoder"][::-1]}
    rows = numpy.array_split(first != drawn(others, digits), 1 + HEADS)
    assert [bool(row.any()) for row in rows] == [False, True, True]
    rows = numpy.array_split(first != drawn(params, digits._replace(images=digits.images[:, :, ::-1])), 1 + HEADS)
    assert all(row.any() for row in rows)


def test_results_of_the_backends_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    results = {"torch": numpy.asarray([[1, 2], [3, 4], [5, 6]]), "numpy": numpy.asarray([[1, 2], [3, 7], [5, 6]])}
    assert not compared(results, "read")
    assert capsys.readouterr().out == "torch: 3 of 3 read as on PyTorch\nnumpy: 2 of 3 read as on PyTorch\n"
    assert compared(dict.fromkeys(results, results["numpy"]), "read")


def test_the_program_fails_if_too_few_digits_are_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        vision.main(steps=2, picture=tmp_path / "vision.png")
    assert (tmp_path / "vision.png").exists()
    assert capsys.readouterr().out.count("360 of 360 classified as on PyTorch") == 4
