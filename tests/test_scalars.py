"""Scalars of NumPy count as the Python value that they hold, as does an offset without axes (MHA-ARG-2, MHA-LEN-3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.calls import BATCH, HEADS, KV_HEADS, KV_LEN, Q_LEN, QK_DIM, V_DIM, arguments, operand
from support.comparisons import assert_equal
from support.layers import EMBED, LENGTH, SIZES, heads, parameters, tokens

from mha_spec import ArgumentTypeError, ArgumentValueError, KVCache, MhaSpecError
from mha_spec.layer_object import LayerSettings
from mha_spec.scalars import check_flag, plain, short_repr

if TYPE_CHECKING:
    from types import ModuleType

HUGE = 10**5000
"""An integer that is too long for a float, and to be spelled by Python."""

ATTENTION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "scale": ({"scale": numpy.float32(0.5)}, {"scale": 0.5}),
    "scale-integer": ({"scale": numpy.int8(2)}, {"scale": 2.0}),
    "scale-half": ({"scale": numpy.float16(0.5)}, {"scale": 0.5}),
    "scale-long": ({"scale": numpy.longdouble(0.5)}, {"scale": 0.5}),
    "softcap": ({"softcap": numpy.float64(2)}, {"softcap": 2.0}),
    "causal": ({"causal": numpy.True_, "q_offset": 0}, {"causal": True, "q_offset": 0}),
    "dropout": (
        {"dropout_rate": numpy.float64(0.25), "dropout_mask": numpy.ones((1, 1, 1, 1), bool)},
        {"dropout_rate": 0.25, "dropout_mask": numpy.ones((1, 1, 1, 1), bool)},
    ),
    "window": ({"window": (numpy.uint8(1), numpy.int64(2)), "q_offset": 0}, {"window": (1, 2), "q_offset": 0}),
    "offset": ({"causal": True, "q_offset": numpy.int16(2)}, {"causal": True, "q_offset": 2}),
    "offset-array": ({"causal": True, "q_offset": numpy.asarray(2, numpy.int8)}, {"causal": True, "q_offset": 2}),
    "offsets": ({"causal": True, "q_offset": [numpy.int16(2), 1]}, {"causal": True, "q_offset": [2, 1]}),
    "lengths": ({"kv_lengths": (numpy.uint64(3), numpy.int8(7))}, {"kv_lengths": [3, 7]}),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_takes_scalars_of_numpy(attention_module: ModuleType, name: str) -> None:
    of_numpy, of_python = ATTENTION[name]
    results = attention_module.attention(**arguments(**of_numpy), return_lse=numpy.True_)
    assert_equal(results, attention_module.attention(**arguments(**of_python), return_lse=True))


@pytest.mark.parametrize("name", ["reference", "numpy"])
def test_the_layer_takes_scalars_of_numpy(name: str) -> None:
    import mha_spec_numpy
    from mha_spec import reference

    module = reference if name == "reference" else mha_spec_numpy
    x = operand(BATCH, HEADS, Q_LEN, QK_DIM + 1)
    turned = module.rotary_embedding(
        x, range(Q_LEN), base=numpy.float32(7), interleaved=numpy.True_, rotary_dim=numpy.int64(4)
    )
    assert_equal(turned, module.rotary_embedding(x, range(Q_LEN), base=7.0, interleaved=True, rotary_dim=4))
    assert_equal(module.alibi_slopes(numpy.int64(6)), module.alibi_slopes(6))
    assert_equal(
        module.alibi_bias(numpy.int8(6), numpy.uint8(3), numpy.int64(5), q_offset=numpy.int32(2)),
        module.alibi_bias(6, 3, 5, q_offset=2),
    )
    sizes = (numpy.int64(BATCH), numpy.int8(KV_HEADS), numpy.uint8(KV_LEN), numpy.int32(QK_DIM), numpy.int16(V_DIM))
    made, expected = (module.empty_cache(*inputs, like=x) for inputs in (sizes, map(int, sizes)))
    assert_equal(made[:2], expected[:2])


def test_the_settings_of_a_layer_hold_values_of_python() -> None:
    inputs: dict[str, Any] = {"kv_heads": numpy.int64(3), "bias": numpy.False_, "norm_epsilon": numpy.float32(0.5)}
    settings = LayerSettings.of(numpy.int16(12), numpy.int8(6), **inputs, dropout_rate=numpy.float64(0.25))
    assert settings == LayerSettings.of(12, 6, kv_heads=3, bias=False, norm_epsilon=0.5, dropout_rate=0.25)
    assert {type(value) for value in settings.arguments.values()} == {int, bool, float, type(None)}


WRONG: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "scale-huge": ({"scale": HUGE}, ArgumentValueError),
    "scale-complex": ({"scale": numpy.complex64(1)}, ArgumentTypeError),
    "scale-bool": ({"scale": numpy.True_}, ArgumentTypeError),
    "scale-date": ({"scale": numpy.datetime64("2020")}, ArgumentTypeError),
    "scale-array": ({"scale": numpy.asarray(1.0)}, ArgumentTypeError),
    "softcap-huge": ({"softcap": HUGE}, ArgumentValueError),
    "softcap-subnormal": ({"softcap": 1e-39}, ArgumentValueError),
    "causal-array": ({"causal": numpy.asarray(True), "q_offset": 0}, ArgumentTypeError),
    "dropout_rate-huge": ({"dropout_rate": HUGE}, ArgumentValueError),
    "window-huge": ({"window": (HUGE, 0), "q_offset": 0}, ArgumentValueError),
    "window-bool": ({"window": (numpy.True_, 0), "q_offset": 0}, ArgumentTypeError),
    "window-word": ({"window": "ab", "q_offset": 0}, ArgumentTypeError),
    "q_offset-huge": ({"q_offset": HUGE, "causal": True}, ArgumentValueError),
    "q_offset-list-huge": ({"q_offset": [HUGE, 0], "causal": True}, ArgumentValueError),
    "q_offset-bool": ({"q_offset": True, "causal": True}, ArgumentTypeError),
    "q_offset-array": ({"q_offset": numpy.asarray(1.0), "causal": True}, ArgumentTypeError),
    "q_offset-bytes": ({"q_offset": b"lower_right", "causal": True}, ArgumentTypeError),
    "q_offset-names": ({"q_offset": ["lower_right"] * 2, "causal": True}, ArgumentTypeError),
    "kv_lengths-none": ({"kv_lengths": [None, 1]}, ArgumentTypeError),
    "kv_lengths-word": ({"kv_lengths": "12"}, ArgumentTypeError),
    "return_lse-word": ({"return_lse": "no"}, ArgumentTypeError),
    "return_lse-number": ({"return_lse": 1}, ArgumentTypeError),
    "return_lse-array": ({"return_lse": numpy.ones(2, bool)}, ArgumentTypeError),
    "value-none": ({"value": None}, ArgumentTypeError),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_values_are_refused(attention_module: ModuleType, name: str) -> None:
    changed, error = WRONG[name]
    with pytest.raises(MhaSpecError, match=f"`{name.split('-', maxsplit=1)[0]}` must ") as caught:
        attention_module.attention(**arguments(**changed))
    assert type(caught.value) is error
    assert len(str(caught.value)) < 400


def test_a_value_is_asked_for_by_gradients_and_not_by_weights(attention_module: ModuleType) -> None:
    grad_output = operand(BATCH, HEADS, Q_LEN, V_DIM)
    with pytest.raises(ArgumentTypeError, match="`value` must be an array, received NoneType"):
        attention_module.attention_vjp(grad_output, **arguments(value=None))
    inputs = {name: array for name, array in arguments().items() if name != "value"}
    assert attention_module.attention_weights(**inputs).shape == (BATCH, HEADS, Q_LEN, KV_LEN)


def layer_call(**changed: Any) -> dict[str, Any]:
    params = parameters(LayerSettings.of(EMBED, 6, qk_norm=True, **SIZES).shapes())
    return {"query": tokens(), "key": tokens(), "value": tokens(), "params": params} | changed


LAYER: dict[str, tuple[str, dict[str, Any], type[Exception]]] = {
    "norm_epsilon-huge": ("multi_head_attention", layer_call(norm_epsilon=HUGE), ArgumentValueError),
    "norm_epsilon-word": ("multi_head_attention", layer_call(norm_epsilon="1e-6"), ArgumentTypeError),
    "base-huge": ("multi_head_attention", layer_call(rotary={"base": HUGE}), ArgumentValueError),
    "rotary-word": ("multi_head_attention", layer_call(rotary="yes"), ArgumentTypeError),
    "cache-tuple": ("multi_head_attention", layer_call(cache=(*heads(LENGTH), [0, 0])), ArgumentTypeError),
    "cache.lengths-none": ("multi_head_attention", layer_call(cache=KVCache(*heads(30), None)), ArgumentTypeError),
    "cache.lengths-number": ("multi_head_attention", layer_call(cache=KVCache(*heads(30), 3)), ArgumentTypeError),
    "heads-float": ("alibi_slopes", {"heads": 4.0}, ArgumentTypeError),
    "heads-huge": ("alibi_slopes", {"heads": -HUGE}, ArgumentValueError),
    "dtype-integer": ("alibi_slopes", {"heads": 4, "dtype": "int32"}, ArgumentValueError),
    "dtype-half": ("alibi_slopes", {"heads": 4, "dtype": "float16"}, ArgumentValueError),
    "dtype-unknown": ("alibi_slopes", {"heads": 4, "dtype": "nope"}, ArgumentValueError),
    "dtype-class": ("alibi_slopes", {"heads": 4, "dtype": numpy.float32}, ArgumentTypeError),
    "q_offset-array": (
        "alibi_bias",
        {"slopes": 4, "q_len": 3, "kv_len": 3, "q_offset": numpy.asarray(1.0)},
        ArgumentValueError,
    ),
    "q_offset-rows": ("alibi_bias", {"slopes": 4, "q_len": 3, "kv_len": 3, "q_offset": [[1], 2]}, ArgumentTypeError),
    "q_len-float": ("alibi_bias", {"slopes": 4, "q_len": 3.0, "kv_len": 3}, ArgumentTypeError),
    "positions-huge": ("rotary_embedding", {"x": operand(1, 1, 2, 4), "positions": [0, HUGE]}, ArgumentTypeError),
    "positions-masked": (
        "rotary_embedding",
        {"x": operand(1, 1, 2, 4), "positions": numpy.ma.masked_array([0, 1], mask=[False, True])},
        ArgumentTypeError,
    ),
}


@pytest.mark.parametrize("name", LAYER)
@pytest.mark.parametrize("module", ["reference", "numpy"])
def test_the_layer_refuses_it_too(module: str, name: str) -> None:
    import mha_spec_numpy
    from mha_spec import reference

    function, call, error = LAYER[name]
    with pytest.raises(MhaSpecError, match=f"`{name.split('-', maxsplit=1)[0]}` must ") as caught:
        getattr(reference if module == "reference" else mha_spec_numpy, function)(**call)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("changed", "argument", "error"),
    [
        ({"batch": -1}, "batch", ArgumentValueError),
        ({"kv_heads": 0}, "kv_heads", ArgumentValueError),
        ({"capacity": 3.0}, "capacity", ArgumentTypeError),
        ({"qk_dim": 0}, "qk_dim", ArgumentValueError),
        ({"v_dim": 0}, "v_dim", ArgumentValueError),
        ({"like": None}, "like", ArgumentTypeError),
        ({"like": numpy.ones(3, int)}, "like", ArgumentTypeError),
    ],
)
def test_a_cache_has_sizes_of_its_range(changed: dict[str, Any], argument: str, error: type[Exception]) -> None:
    from mha_spec import reference

    sizes = {"batch": 2, "kv_heads": 3, "capacity": 5, "qk_dim": 7, "v_dim": 11, "like": operand(1)}
    assert reference.empty_cache(**sizes).value.shape == (2, 3, 5, 11)
    assert reference.empty_cache(**sizes | {"batch": 0, "capacity": 0}).key.shape == (0, 3, 0, 7)
    with pytest.raises(error, match=f"`{argument}` must "):
        reference.empty_cache(**sizes | changed)


def test_values_of_python_are_themselves() -> None:
    import ml_dtypes

    held = [plain(value) for value in (numpy.float64(0.5), ml_dtypes.bfloat16(0.5), numpy.str_("a"), 3, None, [1])]
    assert held == [0.5, 0.5, "a", 3, None, [1]]
    assert [type(value) for value in held] == [float, float, str, int, type(None), list]
    assert check_flag("flag", numpy.False_) is False


def test_a_message_shows_a_value_in_one_short_line() -> None:
    assert short_repr([1, 2]) == "[1, 2]"
    assert "\n" not in short_repr(numpy.ones((3, 30)))
    assert max(len(short_repr(value)) for value in (HUGE, [HUGE], "x" * 1000)) <= 80
