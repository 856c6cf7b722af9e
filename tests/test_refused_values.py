"""Every backend refuses times, absurd sizes and numbers that its framework cannot hold, each by an error of ours."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.calls import BATCH, arguments, operand
from support.layers import EMBED, SIZES, parameters, tokens
from support.libraries import MODULES, of_library

from mha_spec import ArgumentTypeError, ArgumentValueError, MhaSpecError, PagedKVCache, reference, rotary_frequencies
from mha_spec.arrays import host_integers
from mha_spec.layer_object import LayerSettings
from mha_spec.scalars import short_repr
from mha_spec.weights import load_weights

if TYPE_CHECKING:
    from collections.abc import Callable

TIME, DATE, TIMES = numpy.timedelta64(3), numpy.datetime64(3, "ns"), numpy.full(BATCH, numpy.timedelta64(3))
HUGE, LONG = 10**400, 10**5000
"""An integer above every float, and an integer with more digits than Python prints."""
TURNED = {"x": operand(1, 1, 2, 4), "positions": [0, 1]}
CACHE: dict[str, Any] = {"batch": 2, "kv_heads": 3, "capacity": 5, "qk_dim": 7, "like": operand(1)}
ALIBI: dict[str, Any] = {"slopes": 5, "q_len": 3, "kv_len": 3}
PACKED: dict[str, Any] = {"query": operand(5, 2, 4), "key": operand(5, 2, 4), "value": operand(5, 2, 4)}


def layer_call(**options: Any) -> dict[str, Any]:
    params = parameters(LayerSettings.of(EMBED, 6, qk_norm=True, **SIZES).shapes())
    narrow = {name: array.astype("float32") for name, array in params.items()}
    x = tokens().astype("float32")
    return {"query": x, "key": x, "value": x, "params": narrow} | options


Calls = dict[str, tuple[str, dict[str, Any], type[MhaSpecError]]]

TIMED: Calls = {
    "scale": ("attention", arguments(scale=TIME), ArgumentTypeError),
    "softcap": ("attention", arguments(softcap=DATE), ArgumentTypeError),
    "dropout_rate": ("attention", arguments(dropout_rate=numpy.timedelta64(0)), ArgumentTypeError),
    "window": ("attention", arguments(window=(TIME, 0), q_offset=0), ArgumentTypeError),
    "chunk": ("attention", arguments(chunk=TIME, q_offset=0), ArgumentTypeError),
    "q_offset": ("attention", arguments(causal=True, q_offset=TIME), ArgumentTypeError),
    "q_offset-list": ("attention", arguments(causal=True, q_offset=[TIME] * BATCH), ArgumentTypeError),
    "kv_lengths": ("attention", arguments(kv_lengths=[TIME] * BATCH), ArgumentTypeError),
    "kv_lengths-array": ("attention", arguments(kv_lengths=list(TIMES)), ArgumentTypeError),
    "heads": ("alibi_slopes", {"heads": DATE}, ArgumentTypeError),
    "kv_len": ("alibi_bias", ALIBI | {"kv_len": TIME, "q_offset": 0}, ArgumentTypeError),
    "capacity": ("empty_cache", CACHE | {"capacity": TIME}, ArgumentTypeError),
    "base": ("rotary_embedding", TURNED | {"base": TIME}, ArgumentTypeError),
    "rotary_dim": ("rotary_embedding", TURNED | {"rotary_dim": numpy.timedelta64(2)}, ArgumentTypeError),
    "frequencies": ("rotary_embedding", TURNED | {"frequencies": [TIME, TIME]}, ArgumentTypeError),
    "sections": ("rotary_embedding", TURNED | {"sections": [numpy.timedelta64(2)]}, ArgumentTypeError),
    "positions": ("rotary_embedding", TURNED | {"positions": [TIME, TIME]}, ArgumentTypeError),
    "max_seqlen_q": (
        "varlen_attention",
        PACKED | {"cu_seqlens_q": [0, 5], "cu_seqlens_kv": [0, 5], "max_seqlen_q": numpy.timedelta64(5)},
        ArgumentTypeError,
    ),
    "cu_seqlens_q": (
        "varlen_attention",
        PACKED | {"cu_seqlens_q": [0, numpy.timedelta64(5)], "cu_seqlens_kv": [0, 5]},
        ArgumentTypeError,
    ),
}
"""A time of NumPy is no number (MHA-ARG-2)."""

UNBOUNDED: Calls = {
    "batch": ("empty_cache", CACHE | {"batch": HUGE}, ArgumentValueError),
    "kv_heads": ("empty_cache", CACHE | {"kv_heads": LONG}, ArgumentValueError),
    "capacity": ("empty_cache", CACHE | {"capacity": 2**31}, ArgumentValueError),
    "qk_dim": ("empty_cache", CACHE | {"qk_dim": HUGE}, ArgumentValueError),
    "v_dim": ("empty_cache", CACHE | {"v_dim": HUGE}, ArgumentValueError),
    "batch-of-all": ("empty_cache", CACHE | {"batch": 2**30, "capacity": 2**30}, ArgumentValueError),
    "batch-of-values": ("empty_cache", CACHE | {"capacity": 2**30, "v_dim": 2**30}, ArgumentValueError),
    "heads": ("alibi_slopes", {"heads": HUGE}, ArgumentValueError),
    "heads-long": ("alibi_slopes", {"heads": LONG}, ArgumentValueError),
    "slopes": ("alibi_bias", ALIBI | {"slopes": HUGE}, ArgumentValueError),
    "q_len": ("alibi_bias", ALIBI | {"q_len": HUGE, "q_offset": 0}, ArgumentValueError),
    "kv_len": ("alibi_bias", ALIBI | {"kv_len": HUGE, "q_offset": 0}, ArgumentValueError),
    "q_len-of-all": ("alibi_bias", ALIBI | {"q_len": 2**30, "kv_len": 2**30}, ArgumentValueError),
    "cu_seqlens_q": (
        "varlen_attention",
        PACKED | {"cu_seqlens_q": [0, LONG, 5], "cu_seqlens_kv": [0, 2, 5]},
        ArgumentValueError,
    ),
    "attention_factor": ("rotary_embedding", TURNED | {"attention_factor": 1e300}, ArgumentValueError),
    "attention_factor-long": ("rotary_embedding", TURNED | {"attention_factor": LONG}, ArgumentValueError),
    "attention_factor-small": ("rotary_embedding", TURNED | {"attention_factor": 1e-60}, ArgumentValueError),
    "attention_factor-layer": (
        "multi_head_attention",
        layer_call(rotary={"attention_factor": 1e300}),
        ArgumentValueError,
    ),
}
"""Sizes of no array, and numbers that are not finite in the softmax's type."""


def _named(function: Callable[..., Any], name: str, error: type[MhaSpecError]) -> None:
    with pytest.raises(MhaSpecError, match=f"^`{name.split('-', maxsplit=1)[0]}` must ") as caught:
        function()
    assert type(caught.value) is error
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", TIMED)
@pytest.mark.parametrize("module", MODULES)
def test_times_are_no_numbers(module: str, name: str) -> None:
    function, call, error = TIMED[name]
    inputs = of_library(call, MODULES[module])
    _named(lambda: getattr(importlib.import_module(module), function)(**inputs), name, error)


@pytest.mark.parametrize("kind", ["timedelta64[ns]", "datetime64[ns]", "timedelta64"])
@pytest.mark.parametrize("name", ["kv_lengths", "q_offset"])
def test_arrays_of_times_hold_no_integers(attention_module: Any, name: str, kind: str) -> None:
    call = arguments(**{name: numpy.full(BATCH, 3).astype(kind)}, **{} if name == "kv_lengths" else {"causal": True})
    _named(lambda: attention_module.attention(**call), name, ArgumentTypeError)
    _named(
        lambda: attention_module.rotary_embedding(**TURNED, frequencies=numpy.full(2, 3).astype(kind)),
        "frequencies",
        ArgumentTypeError,
    )


def test_a_time_on_the_host_is_not_read() -> None:
    assert host_integers(TIME) is None
    assert host_integers(numpy.int8(3)) == [3]


@pytest.mark.parametrize("name", UNBOUNDED)
@pytest.mark.parametrize("module", MODULES)
def test_absurd_numbers_are_refused(module: str, name: str) -> None:
    function, call, error = UNBOUNDED[name]
    inputs = of_library(call, MODULES[module])
    _named(lambda: getattr(importlib.import_module(module), function)(**inputs), name, error)


LAYERS = {name: library for name, library in MODULES.items() if name != "mha_spec.reference"}


def keywords(library: str) -> dict[str, Any]:
    """Return what the layer of a backend needs beside its settings."""
    return {"key": importlib.import_module("jax").random.key(0)} if library == "jax" else {}


@pytest.mark.parametrize("value", [TIME, HUGE, LONG, 2**31], ids=short_repr)
@pytest.mark.parametrize("name", ["embed", "heads", "kv_heads", "qk_dim", "v_dim", "k_embed", "v_embed", "out"])
@pytest.mark.parametrize("module", LAYERS)
def test_a_layer_has_sizes_of_an_array(module: str, name: str, value: Any) -> None:
    sizes = {"embed": 10, "heads": 5} | {name: value}
    error = ArgumentTypeError if value is TIME else ArgumentValueError
    make = importlib.import_module(module).MultiHeadAttention
    _named(lambda: make(**sizes, **keywords(LAYERS[module])), name, error)


@pytest.mark.parametrize("module", LAYERS)
def test_a_layer_has_no_more_numbers_than_an_array(module: str) -> None:
    make = importlib.import_module(module).MultiHeadAttention
    _named(lambda: make(2**30, 2**30, qk_dim=1, **keywords(LAYERS[module])), "embed", ArgumentValueError)


@pytest.mark.parametrize("name", ["blocks", "block_size", "kv_heads", "qk_dim"])
def test_a_paged_cache_has_sizes_of_an_array(name: str) -> None:
    sizes = {"blocks": 7, "block_size": 2, "kv_heads": 3, "qk_dim": 5} | {name: HUGE}
    _named(lambda: PagedKVCache.empty(numpy.ones((2, 3), int), **sizes, like=operand(1)), name, ArgumentValueError)


@pytest.mark.parametrize("module", MODULES)
def test_integers_stand_for_floats(module: str) -> None:
    """An integer above the integers of a framework is the float of its value."""
    functions, library = importlib.import_module(module), MODULES[module]
    for factor in (2**40, 2**70):
        call = of_library(TURNED, library)
        turned, expected = (functions.rotary_embedding(**call, attention_factor=kind(factor)) for kind in (int, float))
        assert numpy.array_equal(numpy.asarray(turned), numpy.asarray(expected))
    for epsilon in (2**40, 2**70):
        call = of_library(layer_call(), library)
        made, expected = (functions.multi_head_attention(**call, norm_epsilon=kind(epsilon)) for kind in (int, float))
        assert numpy.array_equal(numpy.asarray(made), numpy.asarray(expected))
    settings = LayerSettings.of(10, 5, norm_epsilon=1, rotary={"attention_factor": 2})
    assert [type(settings.norm_epsilon), type(settings.rotary.attention_factor)] == [float, float]


@pytest.mark.parametrize("key", [TIME, "a", True, 1.0])
@pytest.mark.parametrize("module", LAYERS)
def test_a_dropout_key_is_no_time(module: str, key: Any) -> None:
    call = of_library(arguments(dropout_rate=0.5), LAYERS[module])
    attention = importlib.import_module(module).attention
    _named(lambda: attention(**call, dropout_key=key), "dropout_key", ArgumentTypeError)


@pytest.mark.parametrize("module", ["mha_spec_numpy", "mha_spec_tensorflow"])
def test_a_seed_that_is_long_is_refused_in_a_short_message(module: str) -> None:
    call = of_library(arguments(dropout_rate=0.5), LAYERS[module])
    attention = importlib.import_module(module).attention
    _named(lambda: attention(**call, dropout_key=-LONG), "dropout_key", ArgumentValueError)


@pytest.mark.parametrize(
    ("name", "value"), [("heads", TIME), ("heads", LONG), ("kv_heads", DATE), ("kv_heads", HUGE)], ids=short_repr
)
def test_weights_have_heads_of_an_array(name: str, value: Any) -> None:
    state = {f"{param}_proj.weight": numpy.ones((8, 8), "float32") for param in "qkvo"}
    error = ArgumentTypeError if isinstance(value, numpy.generic) else ArgumentValueError
    sizes: dict[str, Any] = {"heads": 2} | {name: value}
    _named(lambda: load_weights(state, "llama", **sizes), name, error)


def test_a_rotation_is_not_computed_from_a_time() -> None:
    _named(lambda: rotary_frequencies(None, numpy.timedelta64(8), 1e4), "dim", ArgumentTypeError)


def test_positions_are_not_sequences_of_any_depth() -> None:
    deep: Any = [0, 1]
    for _ in range(10000):
        deep = [deep]
    for positions in (deep, [[[[0, 1]]]]):
        call = TURNED | {"positions": positions}
        _named(lambda call=call: reference.rotary_embedding(**call), "positions", ArgumentTypeError)


class Unspoken:
    """A class whose objects cannot be spelled."""

    def __repr__(self) -> str:
        raise RuntimeError("repr")


def test_a_value_that_cannot_be_spelled_is_named_by_its_type() -> None:
    assert short_repr(Unspoken()) == "a value of type Unspoken that cannot be shown"
    unknown: dict[str, Any] = {"bias": Unspoken()}
    _named(lambda: LayerSettings.of(10, 5, **unknown), "bias", ArgumentTypeError)
