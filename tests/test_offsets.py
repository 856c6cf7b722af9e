"""Offsets by the name of an alignment, and positions at the edge of their range."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.calls import BATCH, HEADS, KV_HEADS, KV_LEN, Q_LEN, QK_DIM, V_DIM, arguments, operand
from support.comparisons import assert_equal, assert_near
from support.layers import EMBED, LENGTH, heads, parameters, tokens
from support.layers import SIZES as LAYER_SIZES

import mha_spec
from mha_spec import ArgumentValueError, KVCache, reference
from mha_spec.layer_object import LayerSettings

if TYPE_CHECKING:
    from types import ModuleType

KV_LENGTHS, Q_LENGTHS = [4, 7], [2, 5]
READINGS: dict[str, tuple[dict[str, Any], Any]] = {
    "upper-left": ({"q_offset": "upper_left"}, 0),
    "upper-left-with-lengths": ({"q_offset": "upper_left", "kv_lengths": KV_LENGTHS, "q_lengths": Q_LENGTHS}, 0),
    "lower-right": ({"q_offset": "lower_right"}, KV_LEN - Q_LEN),
    "of-keys": ({"q_offset": "lower_right", "kv_lengths": KV_LENGTHS}, [-1, 2]),
    "of-queries": ({"q_offset": "lower_right", "q_lengths": Q_LENGTHS}, [5, 2]),
    "of-both": ({"q_offset": "lower_right", "q_lengths": Q_LENGTHS, "kv_lengths": KV_LENGTHS}, [2, 2]),
    "of-numpy": ({"q_offset": numpy.str_("lower_right"), "kv_lengths": numpy.asarray(KV_LENGTHS, "uint8")}, [-1, 2]),
}


@pytest.mark.parametrize("seen_by", [{"causal": True}, {"window": (1, 1)}], ids=["causal", "window"])
@pytest.mark.parametrize("name", READINGS)
def test_a_reading_is_the_offset_that_it_names(name: str, seen_by: dict[str, Any]) -> None:
    named, offset = READINGS[name]
    inputs = arguments(**named, **seen_by)
    assert_equal(reference.attention(**inputs), reference.attention(**inputs | {"q_offset": offset}))
    assert not numpy.array_equal(reference.attention(**inputs), reference.attention(**inputs | {"q_offset": 1}))


@pytest.mark.parametrize("library", ["torch", "jax", "array_api_strict"])
def test_lengths_that_cannot_be_read_are_clamped_before_they_are_subtracted(library: str) -> None:
    xp = pytest.importorskip({"jax": "jax.numpy"}.get(library, library))
    inputs = {name: xp.asarray(array) for name, array in arguments(causal=True).items() if name != "causal"}
    lengths = {"kv_lengths": xp.asarray(numpy.asarray([99, -3], "int8")), "q_lengths": [2, 5]}
    named = reference.attention(**inputs, **lengths, causal=True, q_offset="lower_right")
    assert_equal(named, reference.attention(**inputs, **lengths, causal=True, q_offset=[KV_LEN - 2, -5]))


def test_an_unknown_name_is_an_error_that_lists_both(attention_module: ModuleType) -> None:
    with pytest.raises(ArgumentValueError, match="'upper_left' or 'lower_right', received q_offset='lower_left'"):
        attention_module.attention(**arguments(causal=True, q_offset="lower_left"))


def test_a_name_is_accepted_where_no_position_matters(attention_module: ModuleType) -> None:
    assert_equal(
        attention_module.attention(**arguments(q_offset="lower_right")), attention_module.attention(**arguments())
    )


def test_linear_biases_know_the_readings() -> None:
    for reading, offset in (("upper_left", 0), ("lower_right", 2)):
        named = reference.alibi_bias(HEADS, Q_LEN, KV_LEN, q_offset=reading)
        assert_equal(named, reference.alibi_bias(HEADS, Q_LEN, KV_LEN, q_offset=offset))
    with pytest.raises(ArgumentValueError, match="'upper_left' or 'lower_right'"):
        reference.alibi_bias(HEADS, Q_LEN, KV_LEN, q_offset="right")


def layer_call(**changed: Any) -> dict[str, Any]:
    settings = LayerSettings.of(EMBED, 6, rotary={}, **LAYER_SIZES)
    call = {"query": tokens(3), "key": tokens(5), "value": tokens(5), "params": parameters(settings.shapes())}
    return call | {"causal": True, "rotary": {"base": 7.0}} | changed


@pytest.mark.parametrize(
    ("lengths", "offset"),
    [({}, 2), ({"kv_lengths": [4, 5]}, [1, 2]), ({"kv_lengths": [4, 5], "q_lengths": [2, 3]}, [2, 2])],
    ids=["none", "keys", "both"],
)
def test_the_layer_rotates_from_the_offset_that_a_reading_names(lengths: dict[str, Any], offset: Any) -> None:
    named = reference.multi_head_attention(**layer_call(q_offset="lower_right", **lengths))
    assert_equal(named, reference.multi_head_attention(**layer_call(q_offset=offset, **lengths)))
    other = reference.multi_head_attention(**layer_call(q_offset=0, **lengths))
    assert not numpy.allclose(named, other)


@pytest.mark.parametrize("rotary", [None, {"base": 7.0}], ids=["plain", "rotary"])
def test_with_a_cache_an_alignment_uses_the_lengths_of_the_new_cache(rotary: dict[str, Any] | None) -> None:
    cache = KVCache(*heads(LENGTH), [2, 4])
    call = layer_call(cache=cache, rotary=rotary, kv_lengths=[5, 3])
    named = reference.multi_head_attention(**call | {"q_offset": "lower_right"})
    numbered = reference.multi_head_attention(**call | {"q_offset": [2 + 5 - 3, 4 + 3 - 3]})
    assert_equal(named[0], numbered[0])
    apart = reference.multi_head_attention(**call | {"q_offset": [2, 4]})
    assert not numpy.allclose(named[0], apart[0])


def test_a_cache_that_nothing_is_appended_to_has_readings_too() -> None:
    cache = KVCache(*heads(LENGTH), [7, 4])
    call = layer_call(cache=cache, key=None, value=None)
    named = reference.multi_head_attention(**call | {"q_offset": "lower_right"})
    assert_equal(named[0], reference.multi_head_attention(**call | {"q_offset": [4, 1]})[0])


FAR = 2**30


@pytest.mark.parametrize("library", ["numpy", "torch", "jax", "array_api_strict"])
@pytest.mark.parametrize(
    ("window", "offset"),
    [
        ((None, FAR), FAR),
        ((None, FAR), FAR - 3),
        ((FAR, FAR), [FAR, -FAR]),
        ((FAR, None), -FAR),
        ((0, FAR), [-FAR, 3 - FAR]),
        ((FAR, 0), [FAR, FAR - 2]),
    ],
    ids=str,
)
def test_positions_hold_at_the_edge_of_their_range(library: str, window: Any, offset: Any) -> None:
    xp = pytest.importorskip({"jax": "jax.numpy"}.get(library, library))
    inputs = {name: xp.asarray(array) for name, array in arguments().items()}
    offsets = offset if isinstance(offset, list) else [offset] * BATCH
    left, right = window
    positions = [[first + i for i in range(Q_LEN)] for first in offsets]
    seen = [
        [
            [(left is None or j >= p - left) and (right is None or j <= p + right) for j in range(KV_LEN)]
            for p in of_entry
        ]
        for of_entry in positions
    ]
    expected = reference.attention(**inputs, mask=xp.asarray(numpy.asarray(seen)[:, None]))
    assert_equal(reference.attention(**inputs, window=window, q_offset=offset), expected)


def test_the_public_face_passes_names_on() -> None:
    inputs = {"causal": True, "q_offset": "lower_right"}
    double = {name: operand.astype("float64") for name, operand in arguments().items()}
    assert_near(mha_spec.attention(**double, **inputs), reference.attention(**double, **inputs))
    gradient = operand(BATCH, HEADS, Q_LEN, V_DIM, dtype="float64")
    assert double["key"].shape == (BATCH, KV_HEADS, KV_LEN, QK_DIM)
    assert_near(
        mha_spec.attention_vjp(gradient, **double, **inputs)[:3],
        reference.attention_vjp(gradient, **double, **inputs)[:3],
    )
