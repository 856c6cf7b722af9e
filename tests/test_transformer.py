"""The example's encoder-decoder against `torch.nn.Transformer`, with the same weights, on every backend.

Two float64 evaluations of one function agree far better than a float32 evaluation does with either, so what float32
loses of ours is the yardstick: another meaning of anything would show many times over.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy
import pytest
import torch
import transformer
from support.comparisons import assert_same, largest_difference
from support.libraries import converted, with_float64

from mha_spec.arrays import library_of
from mha_spec.weights import load_weights
from mha_spec_conformance.targets.conversion import LIBRARIES, to_numpy

BATCH, SOURCE, TARGET, HEADS, EMBED, FEED, BLOCKS = 3, 11, 7, 2, 2 * 5, 13, 2


class Problem(NamedTuple):
    style: transformer.Style
    model: torch.nn.Transformer
    source: numpy.ndarray
    target: numpy.ndarray
    lengths: numpy.ndarray
    memory_mask: numpy.ndarray


def made(style: transformer.Style, **options: Any) -> Problem:
    torch.manual_seed(7)
    sizes = EMBED, HEADS, BLOCKS, BLOCKS, FEED
    model = torch.nn.Transformer(*sizes, dropout=0.0, batch_first=True, dtype=torch.float64, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    rng = numpy.random.default_rng(7)
    mask = rng.random((TARGET, SOURCE)) < 0.7
    mask[:, 0] = True
    source, target = (rng.standard_normal((BATCH, length, EMBED)) for length in (SOURCE, TARGET))
    return Problem(style, model, source, target, numpy.asarray([11, 5, 1], dtype=numpy.int32), mask)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return made(transformer.PAPER)


@pytest.fixture(scope="module")
def later() -> Problem:
    """Make a problem in the style of later models; the epsilon is one that matters."""
    style = transformer.Style(norm_first=True, activation=transformer.gelu, epsilon=0.1)
    return made(style, norm_first=True, activation="gelu", layer_norm_eps=0.1)


def parameters(model: torch.nn.Transformer) -> dict[str, Any]:
    """Return the weights of PyTorch's model under the names of the example."""
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}

    def norm(prefix: str) -> tuple[numpy.ndarray, numpy.ndarray]:
        return state[f"{prefix}.weight"], state[f"{prefix}.bias"]

    def block(prefix: str, attentions: dict[str, str]) -> dict[str, Any]:
        feeds = {
            f"{letter}_{number}": numpy.ascontiguousarray(state[f"{prefix}.linear{number}.{name}"].T)
            for number in (1, 2)
            for letter, name in (("w", "weight"), ("b", "bias"))
        }
        norms = {f"norm_{number + 1}": norm(f"{prefix}.norm{number + 1}") for number in range(len(attentions) + 1)}
        loaded = {
            name: load_weights(state, "torch", heads=HEADS, prefix=f"{prefix}.{theirs}.")
            for name, theirs in attentions.items()
        }
        return {**loaded, **norms, **feeds}

    decoder = {"attention": "self_attn", "cross": "multihead_attn"}
    return {
        "encoder": [block(f"encoder.layers.{number}", {"attention": "self_attn"}) for number in range(BLOCKS)],
        "decoder": [block(f"decoder.layers.{number}", decoder) for number in range(BLOCKS)],
        "norm_encoder": norm("encoder.norm"),
        "norm_decoder": norm("decoder.norm"),
    }


def theirs(problem: Problem, *, masked: bool) -> numpy.ndarray:
    """Compute the output of PyTorch; its masks are True where a pair is hidden."""
    hidden = numpy.arange(SOURCE) >= problem.lengths[:, None]
    with torch.no_grad():
        output = problem.model(
            *(torch.from_numpy(tokens) for tokens in (problem.source, problem.target)),
            tgt_mask=torch.ones(TARGET, TARGET, dtype=torch.bool).triu(1),
            src_key_padding_mask=torch.from_numpy(hidden),
            memory_key_padding_mask=torch.from_numpy(hidden),
            memory_mask=torch.from_numpy(~problem.memory_mask) if masked else None,
        )
    return output.numpy()


def ours(problem: Problem, library: str, dtype: str, *, masked: bool = False, cached: bool = False) -> numpy.ndarray:
    """Compute the output of the example by the backend of `library`."""
    with with_float64(library):
        arrays = parameters(problem.model), problem.source, problem.target, problem.lengths, problem.memory_mask
        params, source, target, lengths, mask = converted(arrays, library, dtype)
        memory = transformer.encode(params, source, lengths, problem.style)
        if cached:
            return token_by_token(params, target, memory, problem.style)
        output = transformer.decode(params, target, memory, mask[None, None] if masked else None, problem.style)
        assert library_of(output) == library
        return to_numpy(output)


def token_by_token(
    params: dict[str, Any], target: Any, memory: transformer.Memory, style: transformer.Style
) -> numpy.ndarray:
    """Compute the output of the decoder token by token, with a cache."""
    caches = transformer.start(params, memory, TARGET)
    outputs = []
    for step in range(TARGET):
        x, caches = transformer.decode_cached(params, target[:, step : step + 1], caches, style)
        assert library_of(x) == library_of(target)
        outputs.append(to_numpy(x))
    return numpy.concatenate(outputs, axis=1)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("masked", [False, True], ids=["lengths", "memory mask"])
def test_the_stack_gives_what_pytorch_gives(problem: Problem, library: str, masked: bool) -> None:
    assert_same(lambda dtype: ours(problem, library, dtype, masked=masked), theirs(problem, masked=masked))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("library", LIBRARIES)
def test_so_does_the_style_of_later_models(later: Problem, library: str) -> None:
    # Token by token costs far less than both ways on every library; the decoder's block is the same function.
    assert_same(lambda dtype: ours(later, library, dtype, cached=True), theirs(later, masked=False))


@pytest.mark.parametrize("library", LIBRARIES)
def test_so_it_does_token_by_token(problem: Problem, library: str) -> None:
    assert_same(lambda dtype: ours(problem, library, dtype, cached=True), theirs(problem, masked=False))


def test_every_mask_matters(problem: Problem) -> None:
    judged = theirs(problem, masked=True)
    single, double = (ours(problem, "numpy", dtype, masked=True) for dtype in ("float32", "float64"))
    whole = problem._replace(lengths=numpy.full(BATCH, SOURCE, dtype=numpy.int32))
    for other in (theirs(problem, masked=False), theirs(whole, masked=True), ours(whole, "numpy", "float64")):
        assert largest_difference(other, judged) > largest_difference(single, double)
