"""Multi-head attention as a layer: its formula, parameters and options, and the errors of bad arguments."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.layer_by_loops import LayerByLoops
from support.numbers import numbers

from mha_spec import ArgumentTypeError, ArgumentValueError, MhaSpecError, layer_steps, reference
from mha_spec.arguments import OPTIONS
from mha_spec.arrays import device_of, dtype_name, library_of
from mha_spec.layer import Layer
from mha_spec.layer_object import LayerSettings
from mha_spec.layer_steps import LayerSteps
from mha_spec_conformance.targets.conversion import to_library, to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

BATCH, Q_LEN, KV_LEN, HEADS, KV_HEADS, CAPACITY = 2, 3, 5, 6, 3, 23
SIZES = LayerSettings(
    embed=7, heads=HEADS, kv_heads=KV_HEADS, qk_dim=4, v_dim=11, k_embed=13, v_embed=17, out=19, qk_norm=True
)


def parameters(*without: str) -> dict[str, numpy.ndarray]:
    shapes = SIZES.shapes()
    return {name: numbers(*shapes[name], seed=seed) / 2 for seed, name in enumerate(shapes) if name not in without}


def tensors() -> dict[str, Any]:
    return {
        "query": numbers(BATCH, Q_LEN, SIZES.embed),
        "key": numbers(BATCH, KV_LEN, SIZES.k_embed),
        "value": numbers(BATCH, KV_LEN, SIZES.v_embed),
        "params": parameters(),
    }


def every_option(kv_len: int = KV_LEN) -> dict[str, Any]:
    draw = numpy.random.default_rng(11)
    return {
        "mask": draw.random((BATCH, 1, Q_LEN, kv_len)) < 0.8,
        "bias": numbers(1, HEADS, 1, kv_len),
        "causal": True,
        "q_offset": numpy.asarray([2, 1]),
        "window": (2, 1),
        "chunk": 3,
        "prefix_lengths": numpy.asarray([4, 5]),
        "q_lengths": numpy.asarray([3, 2]),
        "kv_lengths": numpy.asarray([3, 2]),
        "kv_starts": numpy.asarray([1, 0]),
        "q_segment_ids": draw.integers(0, 2, (BATCH, Q_LEN)),
        "kv_segment_ids": draw.integers(0, 2, (BATCH, kv_len)),
        "scale": -0.7,
        "softcap": 1.9,
        "sinks": numbers(HEADS),
        "dropout_rate": 0.3,
        "dropout_mask": draw.random((1, HEADS, Q_LEN, kv_len)) < 0.7,
    }


@pytest.fixture(params=["mha_spec.reference", "mha_spec_numpy", "mha_spec"])
def module(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


MASK = numpy.random.default_rng(5).random((BATCH, HEADS, Q_LEN, KV_LEN)) < 0.7
CAUSAL = numpy.arange(KV_LEN) <= numpy.arange(Q_LEN)[:, None] + numpy.asarray([2, 1])[:, None, None, None]
FORMULAS: dict[str, tuple[tuple[str, ...], dict[str, Any], dict[str, Any]]] = {
    "plain": (("b_q", "b_k", "b_v", "b_o", "q_norm", "k_norm"), {}, {}),
    "biases": (("q_norm", "k_norm"), {}, {}),
    "one bias": (("b_q", "b_v", "b_o", "q_norm", "k_norm"), {}, {}),
    "norm of the query": (("k_norm",), {}, {}),
    "norms": ((), {"norm_epsilon": 0.25}, {"norm_epsilon": 0.25}),
    "mask": ((), {"mask": MASK}, {"visible": MASK}),
    "bias and sinks": (
        ("q_norm",),
        {"bias": numbers(1, HEADS, Q_LEN, KV_LEN), "sinks": numbers(HEADS)},
        {"bias": numbers(1, HEADS, Q_LEN, KV_LEN) * numpy.ones((BATCH, 1, 1, 1)), "sinks": numbers(HEADS)},
    ),
    "rotary": (
        (),
        {"rotary": {}, "q_offset": [2, 1], "causal": True},
        {"rotary": {}, "visible": CAUSAL, "q_positions": numpy.asarray([[2, 3, 4], [1, 2, 3]])},
    ),
    "partial interleaved rotary": (
        ("b_k",),
        {"rotary": {"interleaved": True, "rotary_dim": 2, "base": 5.0}, "q_offset": -1},
        {
            "rotary": {"interleaved": True, "rotary_dim": 2, "base": 5.0},
            "q_positions": numpy.asarray([[-1, 0, 1]] * BATCH),
        },
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_layer_computes_its_formula(module: ModuleType, name: str) -> None:
    without, options, spelt = FORMULAS[name]
    arguments = tensors() | {"params": parameters(*without)}
    visible = numpy.broadcast_to(spelt.get("visible", True), (BATCH, HEADS, Q_LEN, KV_LEN))
    expected, error = LayerByLoops(arguments["params"])(
        arguments["query"], arguments["key"], arguments["value"], **spelt | {"visible": visible}
    )
    output = module.multi_head_attention(**arguments, **options)
    assert library_of(output) == "numpy"
    assert (output.dtype, output.shape) == (numpy.float64, (BATCH, Q_LEN, SIZES.out))
    assert (abs(output - expected) <= 2 * error).all()
    assert numpy.median(error) < 1e-9 * numpy.median(abs(expected))


def heads_of(arguments: dict[str, Any], *, rotary: bool) -> tuple[numpy.ndarray, ...]:
    """Compute query, key and value of every head by the steps of the layer."""
    params, heads = arguments["params"], []
    for name, x in (("q", arguments["query"]), ("k", arguments["key"]), ("v", arguments["value"])):
        head = layer_steps.add_bias(layer_steps.project(x, params[f"w_{name}"]), params[f"b_{name}"])
        if name != "v":
            head = layer_steps.normalise(head, params[f"{name}_norm"], 1e-6)
            offset = every_option()["q_offset"][:, None] if name == "q" else numpy.zeros((1, 1), int)
            positions = (offset + numpy.arange(x.shape[1])) * numpy.ones((BATCH, 1), int)
            head = reference.rotary_embedding(head, positions) if rotary else head
        heads.append(head)
    return tuple(heads)


@pytest.mark.parametrize("rotary", [None, {}])
def test_every_option_means_the_same_in_the_layer_and_in_attention(rotary: dict[str, Any] | None) -> None:
    assert set(every_option()) == set(OPTIONS) - {"dropout_key"}
    arguments, options = tensors(), every_option()
    q, k, v = heads_of(arguments, rotary=rotary is not None)
    merged = numpy.asarray(reference.attention(q, k, v, **options)).transpose(0, 2, 1, 3).reshape(BATCH, Q_LEN, -1)
    expected = merged @ arguments["params"]["w_o"].reshape(-1, SIZES.out) + arguments["params"]["b_o"]
    output = reference.multi_head_attention(**arguments, **options, rotary=rotary)
    magnitude = abs(merged) @ abs(arguments["params"]["w_o"].reshape(-1, SIZES.out)) + abs(arguments["params"]["b_o"])
    assert (abs(output - expected) <= numpy.finfo(float).eps * (merged.shape[-1] + 1) * magnitude).all()

    weight_options = {name: value for name, value in options.items() if "dropout" not in name}
    weights = reference.multi_head_attention_weights(
        arguments["query"], arguments["key"], arguments["params"], **weight_options, rotary=rotary
    )
    assert numpy.array_equal(weights, reference.attention_weights(q, k, **weight_options))
    assert weights.shape == (BATCH, HEADS, Q_LEN, KV_LEN)


@pytest.mark.parametrize("option", sorted(set(OPTIONS) - {"dropout_key", "kv_segment_ids", "q_offset"}))
def test_every_option_changes_the_output(module: ModuleType, option: str) -> None:
    without = {"q_offset": every_option()["q_offset"]}
    names = {option, "kv_segment_ids"} if option == "q_segment_ids" else {option}
    with_it = {name: value for name, value in every_option().items() if name in names}
    if option == "dropout_rate":
        without["dropout_mask"] = every_option()["dropout_mask"]
    if option == "prefix_lengths":
        without["causal"] = True
    output, plain = (module.multi_head_attention(**tensors(), **without | options) for options in (with_it, {}))
    assert output.shape == plain.shape
    assert not numpy.array_equal(output, plain)


def test_the_backend_has_the_weights_of_the_reference() -> None:
    arguments = {name: value for name, value in tensors().items() if name != "value"}
    options = {name: value for name, value in every_option().items() if "dropout" not in name}
    weights, expected = (
        module.multi_head_attention_weights(**arguments, **options, rotary={})
        for module in (importlib.import_module("mha_spec_numpy"), reference)
    )
    assert (weights.dtype, weights.shape) == (expected.dtype, expected.shape)
    assert (abs(weights - expected) <= 64 * numpy.finfo(float).eps * expected).all()


def test_weights_need_no_parameters_of_the_output(module: ModuleType) -> None:
    arguments = {name: value for name, value in tensors().items() if name != "value"}
    few = arguments | {"params": parameters("w_v", "w_o", "b_v", "b_o")}
    weights = module.multi_head_attention_weights(**arguments)
    assert numpy.array_equal(weights, module.multi_head_attention_weights(**few))


def test_an_empty_row_gives_the_bias_of_the_output(module: ModuleType) -> None:
    arguments, mask = tensors(), numpy.ones((BATCH, 1, Q_LEN, 1), dtype=bool)
    mask[1, :, 2] = False
    output = module.multi_head_attention(**arguments, mask=mask)
    assert numpy.array_equal(output[1, 2], arguments["params"]["b_o"])
    assert not (output[:, :2] == arguments["params"]["b_o"]).any()


@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(0, Q_LEN, KV_LEN), (BATCH, 0, KV_LEN), (BATCH, Q_LEN, 0)])
def test_lengths_of_zero(module: ModuleType, batch: int, q_len: int, kv_len: int) -> None:
    arguments = tensors() | {"query": numbers(batch, q_len, 7), "key": numbers(batch, kv_len, 13)}
    output = module.multi_head_attention(**arguments | {"value": numbers(batch, kv_len, 17)}, rotary={}, q_offset=0)
    assert output.shape == (batch, q_len, SIZES.out)
    assert numpy.array_equal(output, numpy.broadcast_to(arguments["params"]["b_o"], output.shape)) or kv_len > 0


def test_nan_in_a_hidden_token_changes_no_bit(module: ModuleType) -> None:
    arguments = tensors()
    before = module.multi_head_attention(**arguments, kv_lengths=[4, 2])
    for name in ("key", "value"):
        arguments[name][0, 4:] = arguments[name][1, 2:] = numpy.nan
    assert numpy.array_equal(module.multi_head_attention(**arguments, kv_lengths=[4, 2]), before)


def test_inputs_are_not_written_to(module: ModuleType) -> None:
    arguments = tensors()
    for array in (*arguments["params"].values(), arguments["query"], arguments["key"], arguments["value"]):
        array.flags.writeable = False
    module.multi_head_attention(**arguments, **every_option(), rotary={})


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_results_have_the_dtype_of_the_query(module: ModuleType, dtype: str) -> None:
    import ml_dtypes

    stored_dtype = numpy.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    arguments = tensors()
    arguments |= {name: arguments[name].astype(stored_dtype) for name in ("query", "key", "value")}
    arguments["params"] = {name: array.astype(stored_dtype) for name, array in arguments["params"].items()}
    options = {"rotary": {}, "q_offset": 2}
    output = module.multi_head_attention(**arguments, **options)
    weights = module.multi_head_attention_weights(arguments["query"], arguments["key"], arguments["params"], **options)
    assert (dtype_name(output), dtype_name(weights)) == (dtype, dtype)

    wide = {name: array.astype(float) for name, array in arguments["params"].items()}
    stored = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    expected, error = LayerByLoops(wide, min(stored, 2.0**-24), stored)(
        *(arguments[name].astype(float) for name in ("query", "key", "value")),
        visible=numpy.ones((BATCH, HEADS, Q_LEN, KV_LEN), dtype=bool),
        rotary={},
        q_positions=numpy.asarray([[2, 3, 4]] * BATCH),
    )
    assert (abs(output.astype(float) - expected) <= 2 * error).all()


@pytest.mark.parametrize("name", ["query", "key", "value", "params", "cache"])
def test_bytes_of_either_order_have_the_same_dtype(module: ModuleType, name: str) -> None:
    arguments = tensors()
    cache = reference.empty_cache(BATCH, KV_HEADS, CAPACITY, SIZES.qk_dim, SIZES.v_dim, like=arguments["query"])
    arguments["cache"] = reference.append_cache(cache, numbers(BATCH, KV_HEADS, 3, 4), numbers(BATCH, KV_HEADS, 3, 11))
    swapped = arguments | {name: with_swapped_bytes(arguments[name])}
    results, expected = (module.multi_head_attention(**of_call, rotary={}) for of_call in (swapped, arguments))
    for result, like in zip((results[0], *results[1]), (expected[0], *expected[1]), strict=True):
        assert dtype_name(result) == dtype_name(like)
        assert numpy.array_equal(result, like)


def with_swapped_bytes(tree: Any) -> Any:
    """Return equal arrays of floats whose bytes have the other order."""
    if isinstance(tree, dict):
        return {name: with_swapped_bytes(branch) for name, branch in tree.items()}
    if isinstance(tree, tuple):
        return type(tree)(*map(with_swapped_bytes, tree))
    return tree.astype(tree.dtype.newbyteorder()) if tree.dtype.kind == "f" else tree


LIBRARIES = ("array_api_strict", "torch", "jax")


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_reference_computes_the_layer_on_every_library(library: str) -> None:
    xp = pytest.importorskip(library)
    convert: Callable[[numpy.ndarray], Any] = (
        xp.asarray if library == "array_api_strict" else lambda array: to_library(array, library)
    )
    arguments = tensors()
    arguments |= {name: arguments[name].astype("float32") for name in ("query", "key", "value")}
    arguments["params"] = {name: array.astype("float32") for name, array in arguments["params"].items()}
    arrays = {name: convert(arguments[name]) for name in ("query", "key", "value")}
    params = {name: convert(array) for name, array in arguments["params"].items()}
    output = reference.multi_head_attention(**arrays, params=params, rotary={}, q_offset=convert(numpy.asarray([2, 1])))
    assert library_of(output) == library
    assert str(device_of(output)) == str(device_of(arrays["query"]))
    expected, error = LayerByLoops(arguments["params"], 2.0**-24)(
        arguments["query"],
        arguments["key"],
        arguments["value"],
        visible=numpy.ones((BATCH, HEADS, Q_LEN, KV_LEN), dtype=bool),
        rotary={},
        q_positions=numpy.asarray([[2, 3, 4], [1, 2, 3]]),
    )
    assert dtype_name(output) == "float32"
    assert (abs(to_numpy(output) - expected) <= 2 * error).all()


def test_steps_can_be_replaced_by_name() -> None:
    without_norm = Layer(replace(LayerSteps(), normalise=lambda x, *_: x))
    plain = tensors() | {"params": parameters("q_norm", "k_norm")}
    assert numpy.array_equal(without_norm.multi_head_attention(**tensors()), reference.multi_head_attention(**plain))
    assert not numpy.array_equal(reference.multi_head_attention(**tensors()), reference.multi_head_attention(**plain))


def changed(**params: numpy.ndarray | None) -> dict[str, Any]:
    """Change some of the parameters; None omits a parameter."""
    replaced = parameters() | params
    return {"params": {name: array for name, array in replaced.items() if array is not None}}


BAD: dict[str, tuple[dict[str, Any], type[MhaSpecError], str, tuple[str, ...]]] = {
    "query-rank": (
        {"query": numbers(BATCH, HEADS, Q_LEN, 7)},
        ArgumentValueError,
        "query",
        ("rank 3, (batch, q_len, embed)", "shape=(2, 6, 3, 7)"),
    ),
    "query-list": ({"query": [[[1.0]]]}, ArgumentTypeError, "query", ("an array", "list")),
    "query-integers": (
        {"query": numpy.ones((BATCH, Q_LEN, 7), int)},
        ArgumentTypeError,
        "query",
        ("float64, float32", "int64"),
    ),
    "key-dtype": (
        {"key": numbers(BATCH, KV_LEN, 13).astype("float32")},
        ArgumentTypeError,
        "key",
        ("dtype=float64", "dtype=float32", "Convert"),
    ),
    "key-batch": ({"key": numbers(3, KV_LEN, 13)}, ArgumentValueError, "key", ("batch=2", "batch=3")),
    "value-length": ({"value": numbers(BATCH, 4, 17)}, ArgumentValueError, "value", ("kv_len=5", "kv_len=4")),
    "key-none": ({"key": None}, ArgumentValueError, "key", ("given with `value`", "key=None")),
    "both-none": ({"key": None, "value": None}, ArgumentValueError, "key", ("no cache", "key=None")),
    "params-list": ({"params": [1]}, ArgumentTypeError, "params", ("mapping", "list")),
    "missing": (changed(w_k=None), ArgumentValueError, "params", ("w_q, w_k, w_v, w_o", "missing=w_k")),
    "unknown": (changed(w_kv=numbers(2)), ArgumentValueError, "params", ("b_q", "unknown='w_kv'")),
    "none-parameter": ({"params": parameters() | {"b_q": None}}, ArgumentTypeError, "params['b_q']", ("NoneType",)),
    "embed": (
        changed(w_q=numbers(8, HEADS, 4)),
        ArgumentValueError,
        "params['w_q']",
        ("(embed, heads, qk_dim)=(7, ", "shape=(8, 6, 4)"),
    ),
    "k-embed": (
        changed(w_k=numbers(7, KV_HEADS, 4)),
        ArgumentValueError,
        "params['w_k']",
        ("(k_embed, kv_heads, qk_dim)=(13, ", "shape=(7, 3, 4)"),
    ),
    "qk-dim": (
        changed(w_k=numbers(13, KV_HEADS, 5)),
        ArgumentValueError,
        "params['w_k']",
        ("(13, kv_heads, 4)", "shape=(13, 3, 5)"),
    ),
    "kv-heads": (
        changed(w_v=numbers(17, 2, 11)),
        ArgumentValueError,
        "params['w_v']",
        ("(17, 3, v_dim)", "shape=(17, 2, 11)"),
    ),
    "transposed-output": (
        changed(w_o=numbers(11, HEADS, 19)),
        ArgumentValueError,
        "params['w_o']",
        ("(heads, v_dim, out)=(6, 11, out)", "shape=(11, 6, 19)"),
    ),
    "flat-weight": (
        changed(w_q=numbers(7, 24)),
        ArgumentValueError,
        "params['w_q']",
        ("(embed, heads, qk_dim)", "shape=(7, 24)"),
    ),
    "flat-bias": (changed(b_q=numbers(24)), ArgumentValueError, "params['b_q']", ("(6, 4)", "shape=(24,)")),
    "output-bias": (changed(b_o=numbers(7)), ArgumentValueError, "params['b_o']", ("(19)", "shape=(7,)")),
    "gain": (changed(q_norm=numbers(HEADS, 4)), ArgumentValueError, "params['q_norm']", ("(4)", "shape=(6, 4)")),
    "parameter-dtype": (
        changed(w_o=numbers(HEADS, 11, 19).astype("float32")),
        ArgumentTypeError,
        "params['w_o']",
        ("dtype=float64", "dtype=float32"),
    ),
    "head-multiple": (
        changed(w_q=numbers(7, 5, 4), b_q=None, w_o=numbers(5, 11, 19)),
        ArgumentValueError,
        "params",
        ("kv_heads=3", "heads=5"),
    ),
    "epsilon-negative": ({"norm_epsilon": -1e-6}, ArgumentValueError, "norm_epsilon", (">=0", "-1e-06")),
    "epsilon-text": ({"norm_epsilon": "1"}, ArgumentTypeError, "norm_epsilon", ("number", "'1'")),
    "rotary-flag": ({"rotary": True}, ArgumentTypeError, "rotary", ("mapping", "True")),
    "rotary-unknown": ({"rotary": {"theta": 1.0}}, ArgumentTypeError, "rotary", ("base, interleaved", "'theta'")),
    "rotary-size": ({"rotary": {"rotary_dim": 6}}, ArgumentValueError, "rotary_dim", ("size=4", "rotary_dim=6")),
    "rotary-ambiguous": (
        {"rotary": {}},
        ArgumentValueError,
        "q_offset",
        ('q_offset="upper_left" (0', 'q_offset="lower_right" (2', "q_offset=None"),
    ),
    "causal-ambiguous": ({"causal": True}, ArgumentValueError, "q_offset", ("causal=True", "q_offset=None")),
    "offset-shape": ({"rotary": {}, "q_offset": [0, 1, 2]}, ArgumentValueError, "q_offset", ("(2,)", "(3,)")),
    "mask-shape": (
        {"mask": numpy.ones((1, 1, 1, 4), bool)},
        ArgumentValueError,
        "mask",
        ("(2, 6, 3, 5)", "(1, 1, 1, 4)"),
    ),
    "unknown-keyword": ({"attn_mask": MASK}, ArgumentTypeError, "attn_mask", ("not an option", "`mask`")),
    "return-lse": ({"return_lse": True}, ArgumentTypeError, "return_lse", ("not an option",)),
    "rope-keyword": ({"rotery": {}}, ArgumentTypeError, "rotery", ("`rotary`",)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_refused(module: ModuleType, name: str) -> None:
    wrong, error, argument, parts = BAD[name]
    with pytest.raises(MhaSpecError) as caught:
        module.multi_head_attention(**tensors() | wrong)
    assert type(caught.value) is error
    message = str(caught.value)
    for part in (f"`{argument}`", *parts):
        assert part in message
    assert re.search(r"\[MHA-[A-Z]+-\d+\]$", message)


OF_THE_OUTPUT = {"key-none", "transposed-output", "head-multiple", "value-length", "mask-shape"}


@pytest.mark.parametrize("name", sorted(set(BAD) - OF_THE_OUTPUT))
def test_weights_raise_the_same_errors(module: ModuleType, name: str) -> None:
    wrong, error, argument, _ = BAD[name]
    arguments = {key: value for key, value in (tensors() | wrong).items() if key != "value"}
    with pytest.raises(error, match=f"`{re.escape(argument)}`"):
        module.multi_head_attention_weights(**arguments)


def test_weights_take_no_dropout(module: ModuleType) -> None:
    arguments = {name: value for name, value in tensors().items() if name != "value"}
    with pytest.raises(ArgumentTypeError, match=r"`dropout_rate`.*before dropout"):
        module.multi_head_attention_weights(**arguments, dropout_rate=0.1)


def test_another_library_is_refused(module: ModuleType) -> None:
    strict = pytest.importorskip("array_api_strict")
    with pytest.raises(ArgumentTypeError, match=r"`params\['w_q'\]` must be an array of numpy, .*MHA-ARG-4"):
        module.multi_head_attention(**tensors() | changed(w_q=strict.asarray(parameters()["w_q"])))


def test_the_shape_that_an_error_asks_for_is_accepted() -> None:
    arguments = tensors() | {"query": numbers(BATCH, Q_LEN, 8)} | changed(w_q=numbers(8, HEADS, 4))
    assert numpy.shape(reference.multi_head_attention(**arguments)) == (BATCH, Q_LEN, SIZES.out)
