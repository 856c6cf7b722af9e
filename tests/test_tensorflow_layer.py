"""TensorFlow's layer as a layer of Keras: initial weights, config, models, training and mixed precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy
import pytest
import tensorflow as tf
from support.comparisons import assert_equal, assert_near
from support.layers import BATCH, EMBED, HEADS, LENGTH, OUT, SIZES, assert_drawn_as_in_the_paper
from support.numbers import numbers
from support.tensorflow_world import sized, tokens

import mha_spec
import mha_spec_tensorflow
from mha_spec.errors import ArgumentTypeError
from mha_spec_tensorflow import MultiHeadAttention

if TYPE_CHECKING:
    from pathlib import Path


def test_the_object_calls_the_function_with_its_parameters() -> None:
    layer = sized(qk_norm=True, rotary={"base": 5.0}, norm_epsilon=0.5)
    x, key = tokens(), tokens(5, seed=7)
    of_call: dict[str, Any] = {"q_offset": 3, "causal": True}
    options = {"rotary": {"base": 5.0}, "norm_epsilon": 0.5, **of_call}
    assert_equal(layer(x, key, **of_call), mha_spec.multi_head_attention(x, key, key, layer.params, **options))
    expected = mha_spec.multi_head_attention_weights(x, key, layer.params, **options)
    assert_equal(layer.attention_weights(x, key, **of_call), expected)
    assert_equal(layer(x), layer(x, x, x))
    assert {name: tuple(param.shape) for name, param in layer.params.items()} == layer.settings.shapes()
    assert [weight.name for weight in layer.weights] == list(layer.settings.shapes())


def test_initial_weights_are_those_of_the_paper() -> None:
    params = MultiHeadAttention(64, 4, qk_dim=24, out=96, qk_norm=True).params
    assert_drawn_as_in_the_paper({name: param.numpy() for name, param in params.items()})


def test_repr_names_the_options() -> None:
    layer = MultiHeadAttention(24, 4, kv_heads=2, rotary={"base": 5.0}, dropout_rate=0.1)
    assert repr(layer) == "MultiHeadAttention(embed=24, heads=4, kv_heads=2, rotary={'base': 5.0}, dropout_rate=0.1)"


def test_a_layer_is_rebuilt_from_its_config() -> None:
    layer = sized(k_embed=3, rotary={"base": 5.0}, norm_epsilon=0.5, dropout_rate=0.25, qk_norm=True, name="mine")
    again = MultiHeadAttention.from_config(layer.get_config())
    assert (repr(again), again.name, again.dtype_policy.name) == (repr(layer), "mine", "float64")
    assert again.get_config() == layer.get_config()
    deserialized = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert isinstance(deserialized, MultiHeadAttention)
    assert deserialized.get_config() == layer.get_config()


def model_of(layer: Any) -> Any:
    """Make a model of the layer between tokens of unknown lengths."""
    x, memory = keras.Input((None, EMBED), dtype="float64"), keras.Input((None, EMBED), dtype="float64")
    return keras.Model([x, memory], layer(x, memory, causal=True, q_offset=0))


def test_a_model_of_unknown_lengths() -> None:
    layer = sized(rotary={})
    model = model_of(layer)
    assert model.output_shape == (None, None, OUT)
    for length in (3, LENGTH):
        x, memory = tokens(length), tokens(5, seed=6)
        assert_near(model([x, memory]), layer(x, memory, causal=True, q_offset=0))
    predicted = tf.constant(model.predict([tokens(3), tokens(5)], verbose=0))
    assert_near(predicted, layer(tokens(3), tokens(5), causal=True, q_offset=0))


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
def test_a_model_is_saved_and_loaded(tmp_path: Path, ending: str) -> None:
    loaded: Any = None
    options: dict[str, Any] = {"rotary": {"interleaved": True}, "qk_norm": True, "dropout_rate": 0.1}
    path, x = tmp_path / f"model{ending}", [tokens(3), tokens(5, seed=6)]
    model = model_of(sized(**options))
    if ending == ".keras":
        model.save(path)
        loaded = keras.models.load_model(path)
    else:
        model.save_weights(path)
        loaded = model_of(MultiHeadAttention(EMBED, HEADS, dtype="float64", **SIZES | options))
        assert not numpy.array_equal(loaded(x), model(x))
        loaded.load_weights(path)
    assert_equal(loaded(x), model(x))


def test_a_step_of_training() -> None:
    model = model_of(sized(dropout_rate=0.1))
    model.compile(optimizer=keras.optimizers.SGD(0.01), loss="mse", jit_compile=False)
    x, goal = [tokens(3), tokens(5, seed=6)], numbers(BATCH, 3, OUT)
    before = {weight.name: weight.numpy() for weight in model.trainable_weights}
    first = model.evaluate(x, goal, verbose=0)
    model.fit(x, goal, epochs=3, verbose=0)
    assert model.evaluate(x, goal, verbose=0) < first
    after = {weight.name: weight.numpy() for weight in model.trainable_weights}
    assert all((after[name] != before[name]).any() for name in after if name != "b_k")


def test_dropout_is_only_applied_in_training() -> None:
    layer, x = sized(dropout_rate=0.5), tokens()
    assert_equal(layer(x), layer(x, training=False))
    traced = tf.function(lambda x: layer(x, training=True))
    for call in (traced, lambda x: layer(x, training=True)):
        drawn = [call(x).numpy() for _ in range(3)]
        assert not any(numpy.array_equal(*pair) for pair in zip(drawn, drawn[1:] + drawn[:1], strict=True))
    with_key = [layer(x, training=True, dropout_key=key) for key in (1, 1, 2)]
    assert_equal(*with_key[:2])
    assert not numpy.array_equal(*with_key[1:])
    assert_equal(layer(x), layer(x, training=True, dropout_rate=0.0))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_computes_in_its_type(policy: str) -> None:
    layer, x = sized(policy, rotary={}), tokens()
    half = policy.removeprefix("mixed_")
    with tf.GradientTape() as tape:
        output = layer(x)
        total = tf.reduce_sum(tf.cast(output, tf.float32))
    step, cache = layer(x, cache=layer.empty_cache(BATCH, LENGTH))
    assert {array.dtype.name for array in (output, step, cache.key, cache.value)} == {half}
    gradients = tape.gradient(total, [weight.value for weight in layer.trainable_weights])
    assert {gradient.dtype.name for gradient in gradients} == {"float32"}
    params = {weight.name: tf.cast(weight.value, half) for weight in layer.trainable_weights}
    x = tf.cast(x, half)
    assert_equal(output, mha_spec_tensorflow.multi_head_attention(x, x, x, params, rotary={}))


def test_mixed_precision_rounds_no_bias_no_sink_and_no_position() -> None:
    """Keras casts every floating argument of a layer: 257 is 256 in bfloat16 (MHA-BIAS-2, MHA-ROTARY-5)."""
    layer, x = sized("mixed_bfloat16", rotary={}), tf.cast(tokens(), tf.bfloat16)
    options = {
        "bias": tf.constant(100 + numbers(1, HEADS, 1, LENGTH), tf.float32),
        "sinks": tf.constant(100 + numbers(HEADS), tf.float32),
        "positions": tf.range(257.0, 257 + LENGTH),
    }
    wanted = mha_spec_tensorflow.multi_head_attention(x, x, x, layer.params, rotary={}, **options)
    assert_equal(layer(x, **options), wanted)
    assert_equal(layer(tf.cast(x, tf.float32), **options), wanted)
    assert_equal(layer.output_and_weights(x, **options)[0], wanted)
    inputs = {name: keras.Input(batch_shape=x.shape, dtype=x.dtype.name) for name, x in options.items()}
    query = keras.Input(batch_shape=x.shape, dtype="bfloat16")
    assert_equal(keras.Model([query, inputs], layer(query, **inputs))([x, options]), wanted)


def test_a_layer_without_autocast_takes_its_own_type() -> None:
    layer = MultiHeadAttention(8, 2, dtype="mixed_bfloat16", autocast=False)
    with pytest.raises(ArgumentTypeError, match=r"`params\['w_q'\]` must have the dtype"):
        layer(tf.zeros((2, 3, 8)))
    assert layer(tf.zeros((2, 3, 8), tf.bfloat16)).dtype == tf.bfloat16


def test_masks_of_keras_raise_a_warning() -> None:
    embedding, layer = keras.layers.Embedding(5, EMBED, mask_zero=True), MultiHeadAttention(EMBED, 1)
    x = embedding(numpy.asarray([[1, 2, 0]]))
    with pytest.warns(UserWarning, match="does not support masking"):
        layer(x)


def test_weights_are_computed_in_the_type_of_the_policy() -> None:
    layer = MultiHeadAttention(8, 2, dtype="mixed_bfloat16", autocast=True, activity_regularizer="l2")
    x = tf.constant(numbers(2, 3, 8), tf.float32)
    output, weights = layer.output_and_weights(x)
    assert_equal([output, weights], [layer(x), layer.attention_weights(x)])
    assert (output.dtype, weights.dtype) == (tf.bfloat16, tf.bfloat16)
    again = MultiHeadAttention.from_config(layer.get_config())
    assert (again.settings, again.compute_dtype) == (layer.settings, "bfloat16")


@pytest.mark.parametrize(
    ("name", "hint"), [("is_causal", "Did you mean `causal`"), ("use_causal_mask", "The options are")]
)
def test_an_option_of_another_layer_is_refused_with_a_hint(name: str, hint: str) -> None:
    with pytest.raises(ArgumentTypeError, match=f"`{name}` is not an option of multi_head_attention. {hint}"):
        sized()(tokens(), **{name: True})


def test_a_subclass_may_have_options_of_its_own() -> None:
    class Doubled(MultiHeadAttention):
        def call(self, query: tf.Tensor, **options: Any) -> tf.Tensor:
            return options.get("times", 1) * super().call(query)

    layer = Doubled(EMBED, HEADS, dtype="float64", **SIZES)
    assert_equal(layer(tokens(), times=2), 2 * layer(tokens()))
