"""The settings of a layer, and NumPy's layer as an object."""

from __future__ import annotations

import inspect
from typing import Any

import numpy
import pytest
from support.numbers import numbers

import mha_spec_numpy
from mha_spec import ArgumentTypeError, ArgumentValueError
from mha_spec.layer_object import LayerOptions, LayerSettings
from mha_spec.parameters import AXES
from mha_spec_numpy import MultiHeadAttention


@pytest.mark.parametrize(
    ("arguments", "shapes"),
    [
        ({}, {"w_q": (10, 5, 2), "w_k": (10, 5, 2), "w_v": (10, 5, 2), "w_o": (5, 2, 10)}),
        ({"kv_heads": 1}, {"w_q": (10, 5, 2), "w_k": (10, 1, 2), "w_v": (10, 1, 2), "w_o": (5, 2, 10)}),
        ({"qk_dim": 3}, {"w_q": (10, 5, 3), "w_k": (10, 5, 3), "w_v": (10, 5, 3), "w_o": (5, 3, 10)}),
        ({"v_dim": 7, "out": 11}, {"w_q": (10, 5, 2), "w_k": (10, 5, 2), "w_v": (10, 5, 7), "w_o": (5, 7, 11)}),
        ({"k_embed": 13, "v_embed": 17}, {"w_q": (10, 5, 2), "w_k": (13, 5, 2), "w_v": (17, 5, 2), "w_o": (5, 2, 10)}),
    ],
)
def test_sizes_have_defaults(arguments: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
    assert LayerSettings.of(10, 5, **arguments, bias=False).shapes() == shapes
    words = ", ".join(f"{name}={value}" for name, value in arguments.items())
    assert str(LayerSettings.of(10, 5, **arguments)) == ", ".join(filter(None, ("embed=10, heads=5", words)))


def test_sizes_say_which_parameters_there_are() -> None:
    assert set(LayerSettings.of(10, 5).shapes()) == {name for name in AXES if not name.endswith("norm")}
    joint = {"q_joint_norm", "k_joint_norm"}
    assert set(LayerSettings.of(10, 5, qk_norm=True).shapes()) == set(AXES) - joint
    assert set(LayerSettings.of(10, 5, qk_norm="joint").shapes()) == set(AXES) - {"q_norm", "k_norm"}
    assert str(LayerSettings.of(10, 5, bias=False, qk_norm=True)) == "embed=10, heads=5, bias=False, qk_norm=True"
    assert str(LayerSettings.of(10, 5, qk_norm="joint")) == "embed=10, heads=5, qk_norm=joint"


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"embed": 11, "heads": 5}, ArgumentValueError, ("`embed`", "heads=5", "embed=11", "qk_dim")),
        ({"embed": 10, "heads": 0}, ArgumentValueError, ("`heads`", "heads>=1", "heads=0")),
        ({"embed": 10, "heads": 5, "kv_heads": 2}, ArgumentValueError, ("`heads`", "kv_heads=2", "MHA-HEAD-2")),
        ({"embed": 10, "heads": 5, "v_dim": 2.0}, ArgumentTypeError, ("`v_dim`", "integer", "2.0")),
        ({"embed": True, "heads": 1}, ArgumentTypeError, ("`embed`", "True")),
        ({"embed": 10, "heads": None}, ArgumentTypeError, ("`heads`", "None")),
        ({"embed": 10, "heads": 5, "size": 2}, ArgumentTypeError, ("`size`", "kv_heads", "dropout_rate")),
        ({"embed": 10, "heads": 5, "kv_head": None}, ArgumentTypeError, ("`kv_head`", "kv_heads")),
        ({"embed": 10, "heads": 5, "bias": None}, ArgumentTypeError, ("`bias`", "True or False", "bias=None")),
        ({"embed": 10, "heads": 5, "norm_epsilon": None}, ArgumentTypeError, ("`norm_epsilon`", "None")),
        ({"embed": 10, "heads": 5, "dropout_rate": None}, ArgumentTypeError, ("`dropout_rate`", "None")),
        ({"embed": 10, "heads": 5, "bias": 1}, ArgumentTypeError, ("`bias`", "True or False", "bias=1")),
        ({"embed": 10, "heads": 5, "qk_norm": "yes"}, ArgumentValueError, ("`qk_norm`", '"joint"', "'yes'")),
        ({"embed": 10, "heads": 5, "qk_norm": 1}, ArgumentTypeError, ("`qk_norm`", "True or False", "qk_norm=1")),
        ({"embed": 10, "heads": 5, "norm_epsilon": -1.0}, ArgumentValueError, ("`norm_epsilon`", ">=0", "-1.0")),
        ({"embed": 10, "heads": 5, "dropout_rate": 1.0}, ArgumentValueError, ("`dropout_rate`", "<1", "=1.0")),
        ({"embed": 10, "heads": 5, "dropout_rate": "0"}, ArgumentTypeError, ("`dropout_rate`", "number", "'0'")),
        ({"embed": 10, "heads": 5, "rotary": {"bass": 2.0}}, ArgumentTypeError, ("`rotary`", "base", "bass")),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, Any], error: type[Exception], parts: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        LayerSettings.of(**arguments)
    assert all(part in str(caught.value) for part in parts)


def test_settings_are_made_again_by_their_arguments() -> None:
    made = LayerSettings.of(10, 5, kv_heads=1, rotary={"base": 5.0, "interleaved": False}, dropout_rate=0.1)
    assert LayerSettings.of(**made.arguments) == made
    assert hash(LayerSettings.of(**made.arguments)) == hash(made)
    assert made.arguments["rotary"] == {"base": 5.0}


def test_a_layer_spells_its_options() -> None:
    parameters = inspect.signature(MultiHeadAttention).parameters
    assert [*parameters] == ["embed", "heads", "dtype", "rng", *LayerOptions.__annotations__]
    assert (parameters["bias"].default, parameters["norm_epsilon"].default) == (True, 1e-6)


def layer(**options: Any) -> MultiHeadAttention:
    sizes = {"kv_heads": 3, "qk_dim": 4, "v_dim": 11, "k_embed": 13, "v_embed": 17, "out": 19}
    return MultiHeadAttention(7, 6, **sizes, dtype="float64", rng=3, **options)


def test_the_object_is_the_function_with_its_parameters() -> None:
    made, options = layer(qk_norm=True, rotary={"base": 7.0}, norm_epsilon=0.5), {"q_offset": 1}
    combined: dict[str, Any] = {"rotary": {"base": 7.0}, "norm_epsilon": 0.5, "q_offset": 1}
    query, key, value = numbers(2, 3, 7), numbers(2, 5, 13), numbers(2, 5, 17)
    assert numpy.array_equal(
        made(query, key, value, **options),
        mha_spec_numpy.multi_head_attention(query, key, value, made.params, **combined),
    )
    assert numpy.array_equal(
        made.attention_weights(query, key, **options),
        mha_spec_numpy.multi_head_attention_weights(query, key, made.params, **combined),
    )
    plain = MultiHeadAttention(7, 1, dtype="float64")
    assert numpy.array_equal(plain(query), plain(query, query, query))


def test_the_object_begins_as_the_paper_does() -> None:
    made = MultiHeadAttention(96, 4, kv_heads=2, out=50, qk_norm=True, rng=3)
    bounds = {"w_q": (96, 96), "w_k": (96, 48), "w_v": (96, 48), "w_o": (96, 50)}
    assert {name: array.shape for name, array in made.params.items()} == made.settings.shapes()
    for name, (fan_in, fan_out) in bounds.items():
        bound, drawn = (6 / (fan_in + fan_out)) ** 0.5, made.params[name]
        assert abs(drawn).max() <= numpy.float32(bound)
        six_deviations = 6 * bound / (3 * drawn.size) ** 0.5
        assert abs(drawn.mean()) <= six_deviations
        assert abs((drawn**2).mean() - bound**2 / 3) <= bound * six_deviations
    for name in made.params.keys() - bounds.keys():
        assert (made.params[name] == float("norm" in name)).all()
    again = MultiHeadAttention(96, 4, kv_heads=2, out=50, qk_norm=True, rng=3)
    assert all(numpy.array_equal(made.params[name], again.params[name]) for name in made.params)


def test_the_object_drops_in_training_alone() -> None:
    made = MultiHeadAttention(8, 2, dropout_rate=0.5, rng=3)
    x = numbers(2, 5, 8).astype("float32")
    assert numpy.array_equal(made(x, dropout_key=1), made(x, dropout_key=2))
    made.training = True
    assert not numpy.array_equal(made(x, dropout_key=1), made(x, dropout_key=2))
    assert numpy.array_equal(made(x, dropout_rate=0.0), made(x, dropout_rate=0.0))


def test_the_output_with_weights_has_dropout_in_training_too() -> None:
    made = MultiHeadAttention(8, 2, dropout_rate=0.5, rng=3)
    x = numbers(2, 5, 8).astype("float32")
    assert numpy.array_equal(made.output_and_weights(x)[0], made(x))
    made.training = True
    assert numpy.array_equal(made.output_and_weights(x, dropout_key=1)[0], made(x, dropout_key=1))


@pytest.mark.parametrize("name", ["rotary", "norm_epsilon"])
def test_a_setting_is_not_an_option_of_a_call(name: str) -> None:
    made, x = MultiHeadAttention(8, 2), numbers(2, 5, 8).astype("float32")
    for call in (made, made.attention_weights, made.output_and_weights):
        with pytest.raises(ArgumentTypeError, match=f"`{name}` is a setting of the layer"):
            call(x, **{name: None})


def test_the_object_shows_its_settings() -> None:
    assert repr(MultiHeadAttention(10, 5)) == "MultiHeadAttention(embed=10, heads=5)"
    assert repr(MultiHeadAttention(10, 5, kv_heads=1, bias=False, rotary={"base": 5.0}, dropout_rate=0.1)) == (
        "MultiHeadAttention(embed=10, heads=5, kv_heads=1, bias=False, rotary={'base': 5.0}, dropout_rate=0.1)"
    )


def test_the_object_refuses_a_rotation_that_it_cannot_make() -> None:
    with pytest.raises(ArgumentValueError, match="`rotary_dim`"):
        MultiHeadAttention(9, 3, rotary={})


def test_the_object_makes_its_cache() -> None:
    made = mha_spec_numpy.MultiHeadAttention(8, 6, kv_heads=2, qk_dim=4, v_dim=5, rotary={}, dtype="float64", rng=3)
    x, cache, outputs = numbers(2, 7, 8), made.empty_cache(2, 7), []
    assert repr(cache) == "KVCache(key=(2, 2, 7, 4), value=(2, 2, 7, 5), lengths=array([0, 0], dtype=int32))"
    for t in range(7):
        output, cache = made(x[:, t : t + 1], cache=cache, causal=True)
        outputs.append(output)
    whole = made(x, causal=True)
    assert abs(numpy.concat(outputs, axis=1) - whole).max() <= 256 * numpy.finfo(float).eps * abs(whole).max()
