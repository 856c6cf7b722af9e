"""Positions of the caller in the layer, and positions on several axes, on every backend."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.comparisons import assert_near
from support.numbers import numbers
from support.pages_of_docs import blocks_of

from mha_spec import ArgumentTypeError, ArgumentValueError, KVCache, reference
from mha_spec_conformance.judging.bounds import bounds, precision
from mha_spec_conformance.targets.conversion import to_library, to_numpy
from mha_spec_conformance.testing import assert_rotary

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

BATCH, HEADS, LENGTH, SIZE = 2, 3, 5, 8
LIBRARIES = ("numpy", "torch", "jax", "tensorflow")
SECTIONS = (1, 2, 1)
OF_AXES = numpy.random.default_rng(0).integers(-3, 50, (3, BATCH, LENGTH), dtype="int32")
OF_ENTRIES = numpy.asarray([[0, 1, 2, 0, 1], [0, 0, 0, 1, 2]], dtype="int32")
PARAMS = {
    name: numbers(*shape, seed=seed)
    for seed, (name, shape) in enumerate(
        {"w_q": (7, 4, SIZE), "w_k": (7, 2, SIZE), "w_v": (7, 2, 5), "w_o": (4, 5, 11)}.items()
    )
}
TOKENS = numbers(BATCH, LENGTH, 7, seed=11)


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(f"mha_spec_{request.param}")
    return request.param


def backend(library: str) -> ModuleType:
    return importlib.import_module(f"mha_spec_{library}")


def compiled(library: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as the library compiles or traces it as a whole."""
    if library == "numpy":
        return function
    framework: Any = importlib.import_module(library)
    if library == "torch":
        return framework.compile(function, fullgraph=True, backend="eager")
    return framework.jit(function) if library == "jax" else framework.function(function, autograph=False)


def attended(positions: Any, **options: Any) -> Any:
    return reference.multi_head_attention(TOKENS, TOKENS, TOKENS, PARAMS, positions=positions, **options)


def test_sections_turn_as_those_of_qwen2_vl() -> None:
    """The judge is the embedding of `transformers`, which recomposes cosines and sines by sections."""
    torch = pytest.importorskip("torch")
    qwen = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    configuration = pytest.importorskip("transformers.models.qwen2_vl.configuration_qwen2_vl")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(SECTIONS)}
    config = configuration.Qwen2VLTextConfig(
        hidden_size=HEADS * SIZE, num_attention_heads=HEADS, num_key_value_heads=HEADS, rope_parameters=rope
    )
    x = torch.tensor(numbers(BATCH, HEADS, LENGTH, SIZE).astype("float32"))
    cosine, sine = (turn[:, None] for turn in qwen.Qwen2VLRotaryEmbedding(config)(x, torch.tensor(OF_AXES)))
    expected = x * cosine + qwen.rotate_half(x) * sine
    assert_rotary(expected.numpy(), x.numpy(), OF_AXES, sections=SECTIONS)


def test_axes_in_turn_are_those_of_qwen3_vl(library: str) -> None:
    """Each pair has a section of its own, whose positions are those of its axis; `transformers` is the judge."""
    torch = pytest.importorskip("torch")
    qwen = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")
    configuration = pytest.importorskip("transformers.models.qwen3_vl.configuration_qwen3_vl")
    sections, size = (5, 2, 3), 20
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    config = configuration.Qwen3VLTextConfig(head_dim=size, num_attention_heads=HEADS, rope_parameters=rope)
    x = numbers(BATCH, HEADS, LENGTH, size).astype("float32")
    embedding = qwen.Qwen3VLTextRotaryEmbedding(config)
    cosine, sine = (turn[:, None] for turn in embedding(torch.tensor(x), torch.tensor(OF_AXES)))
    expected = torch.tensor(x) * cosine + qwen.rotate_half(torch.tensor(x)) * sine

    axes = in_turn(sections)
    options: dict[str, Any] = {"sections": [1] * len(axes)}
    assert_rotary(expected.numpy(), x, OF_AXES[axes], **options)
    where = to_library(OF_AXES[axes], library)
    ours = backend(library).rotary_embedding(to_library(x, library), where, **options)
    assert_rotary(to_numpy(ours), x, OF_AXES[axes], **options)
    with pytest.raises(AssertionError):
        assert_rotary(expected.numpy(), x, OF_AXES, sections=sections)


def test_the_page_gives_the_axes_of_qwen3_vl() -> None:
    (program,) = [block.text for block in blocks_of("weights.md", "python") if "mrope_section" in block.text]
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["axes"].tolist() == in_turn((24, 20, 20)).tolist()
    assert names["positions"].shape == (sum(names["rotary"]["sections"]), 1, 5)


def in_turn(sections: tuple[int, ...]) -> numpy.ndarray:
    """Return the axis of each pair where the axes take pairs in turn; the first axis has those that are left."""
    axes = numpy.zeros(sum(sections), int)
    for axis, pairs in enumerate(sections[1:], start=1):
        axes[axis : axis + pairs * len(sections) : len(sections)] = axis
    return axes


@pytest.mark.parametrize("traced", [False, True], ids=["called", "compiled"])
@pytest.mark.parametrize("host", [False, True], ids=["of-the-library", "on-the-host"])
def test_axes_turn_their_sections(library: str, host: bool, traced: bool) -> None:
    module, listed = backend(library), OF_AXES.tolist()

    def rotated(x: Any, positions: Any) -> Any:
        where = listed if host else positions
        return module.rotary_embedding(x, where, sections=SECTIONS, interleaved=True)

    function = compiled(library, rotated) if traced else rotated
    x = numbers(BATCH, HEADS, LENGTH, SIZE).astype("float32")
    output = to_numpy(function(to_library(x, library), to_library(OF_AXES, library)))
    assert_rotary(output, x, OF_AXES, sections=SECTIONS, interleaved=True)


def test_sections_change_nothing_where_all_axes_are_equal() -> None:
    x = numbers(BATCH, HEADS, LENGTH, SIZE)
    plain = reference.rotary_embedding(x, OF_ENTRIES)
    for positions in (OF_ENTRIES, numpy.stack([OF_ENTRIES] * 3)):
        assert numpy.array_equal(reference.rotary_embedding(x, positions, sections=SECTIONS), plain)


@pytest.mark.parametrize("positions", [OF_ENTRIES, OF_AXES, OF_ENTRIES[1]], ids=["entries", "axes", "shared"])
@pytest.mark.parametrize("traced", [False, True], ids=["called", "compiled"])
def test_the_layer_turns_by_positions(library: str, traced: bool, positions: numpy.ndarray) -> None:
    options: dict[str, Any] = {"causal": True, "rotary": {"sections": SECTIONS} if positions.ndim == 3 else {}}
    arrays = {name: array.astype("float32") for name, array in PARAMS.items()}
    params = {name: to_library(array, library) for name, array in arrays.items()}
    tokens, module = TOKENS.astype("float32"), backend(library)

    def layer(x: Any, where: Any) -> Any:
        return module.multi_head_attention(x, x, x, params, positions=where, **options)

    function = compiled(library, layer) if traced else layer
    output = to_numpy(function(to_library(tokens, library), to_library(positions, library)))
    operands = dict.fromkeys(("query", "key", "value"), tokens)
    expected = bounds("multi_head_attention", {**operands, **arrays, "positions": positions}, options)
    allowed = expected.allowances(precision("float32"))["output"]
    assert (abs(output.astype("float64") - expected.values["output"]) <= allowed).all()


def test_positions_turn_queries_and_keys_and_change_nothing_else() -> None:
    q, k, v = (numpy.einsum("ble,ehd->bhld", TOKENS, PARAMS[name]) for name in ("w_q", "w_k", "w_v"))
    q, k = (reference.rotary_embedding(heads, OF_ENTRIES) for heads in (q, k))
    expected = numpy.einsum("bhqd,hdo->bqo", reference.attention(q, k, v, causal=True), PARAMS["w_o"])
    assert_near(attended(OF_ENTRIES, rotary={}, causal=True), expected)


def test_counted_positions_are_the_default() -> None:
    counted = attended(numpy.arange(LENGTH), rotary={}, causal=True)
    assert numpy.array_equal(counted, attended(None, rotary={}, causal=True))


@pytest.mark.parametrize("library", ["numpy", "torch", "tensorflow"])
def test_a_cache_keeps_the_positions_of_its_keys(library: str) -> None:
    pytest.importorskip(f"mha_spec_{library}")
    module, params = backend(library), {name: to_library(array, library) for name, array in PARAMS.items()}
    x, outputs = to_library(TOKENS, library), []
    cache = KVCache.empty(BATCH, 2, LENGTH, SIZE, 5, like=x)
    for start, stop in ((0, 3), (3, 4), (4, 5)):
        part, where = x[:, start:stop], OF_ENTRIES[:, start:stop]
        output, cache = module.multi_head_attention(
            part, part, part, params, rotary={}, causal=True, positions=where, cache=cache
        )
        outputs.append(to_numpy(output))
    assert_near(numpy.concatenate(outputs, axis=1), attended(OF_ENTRIES, rotary={}, causal=True))


def test_modules_pass_positions() -> None:
    layer = backend("numpy").MultiHeadAttention(16, 2, rotary={}, rng=0)
    x = numbers(BATCH, LENGTH, 16).astype("float32")
    expected = backend("numpy").multi_head_attention(x, x, x, layer.params, rotary={}, positions=OF_ENTRIES)
    assert numpy.array_equal(layer(x, positions=OF_ENTRIES), expected)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "without-rotary": ({"positions": OF_ENTRIES}, ArgumentValueError, "`positions` .* MHA-LAYER-7"),
    "too-few": ({"positions": OF_ENTRIES[:, :3], "rotary": {}}, ArgumentValueError, "`positions` .*MHA-ROTARY-6"),
    "scalar": ({"positions": 3, "rotary": {}}, ArgumentValueError, "`positions` .*MHA-ROTARY-6"),
    "text": ({"positions": "first", "rotary": {}}, ArgumentTypeError, "`positions` .*MHA-ROTARY-6"),
    "ragged": ({"positions": [[1, 2], [3]], "rotary": {}}, ArgumentTypeError, "`positions` .*MHA-ROTARY-6"),
    "flags": ({"positions": OF_ENTRIES > 0, "rotary": {}}, ArgumentTypeError, "`positions` .*MHA-ROTARY-6"),
    "axes": ({"positions": OF_AXES, "rotary": {}}, ArgumentValueError, "`positions` .*MHA-ROTARY-6"),
    "fewer-axes": (
        {"positions": OF_AXES[:2], "rotary": {"sections": SECTIONS}},
        ArgumentValueError,
        "`positions` .*MHA-ROTARY-17",
    ),
    "sum": ({"rotary": {"sections": (2, 4, 2)}}, ArgumentValueError, "`sections` .*MHA-ROTARY-17"),
    "negative": ({"rotary": {"sections": (5, -1)}}, ArgumentValueError, "`sections` .*MHA-ROTARY-17"),
    "none": ({"rotary": {"sections": ()}}, ArgumentValueError, "`sections` .*MHA-ROTARY-17"),
    "floats": ({"rotary": {"sections": (1.0, 3.0)}}, ArgumentTypeError, "`sections` .*MHA-ROTARY-17"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_refused(library: str, name: str) -> None:
    options, error, message = BAD[name]
    x, params = to_library(TOKENS, library), {name: to_library(array, library) for name, array in PARAMS.items()}
    with pytest.raises(error, match=message.replace(" MHA", r".*\[MHA")):
        backend(library).multi_head_attention(x, x, x, params, **options)
