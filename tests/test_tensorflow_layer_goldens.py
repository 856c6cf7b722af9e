"""TensorFlow's layer compared with the goldens and the reference, eager, in graphs and by XLA."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy
import pytest
import tensorflow as tf
from support.comparisons import assert_equal, assert_same
from support.goldens import LAYER, PER_ENTRY, cases, cases_with_each, compiled, layer_failures, layers_alike, names
from support.layers import BATCH, EMBED, HEADS, OPTIONS, by_reference, weight_options
from support.tensorflow_world import floats, sized, tensors, tokens, with_gradients

import mha_spec_tensorflow
from mha_spec import reference


def test_every_golden() -> None:
    assert not layer_failures("tensorflow", cases(*LAYER), "float32")


def test_goldens_in_other_dtypes() -> None:
    assert not layer_failures("tensorflow", cases_with_each(LAYER), "float64", "float16", "bfloat16")


def test_goldens_with_numbers_on_the_host() -> None:
    some = [case for case in cases(*LAYER) if names(case).intersection(PER_ENTRY)]
    assert not layer_failures("tensorflow", some, "float32", host=PER_ENTRY)


def test_goldens_in_a_function() -> None:
    some = [case for case in layers_alike() if "drafts" not in case.options]
    assert not layer_failures("tensorflow", some, "float32", wrapped=partial(compiled, tf.function))


def test_goldens_by_xla() -> None:
    some = cases_with_each(LAYER, "rotary", "bias", "dropout_mask", "cache_key", "cache_block_table", "kv_segment_ids")
    some = [case for case in some if "drafts" not in case.options]
    by_xla = partial(compiled, partial(tf.function, jit_compile=True))
    assert not layer_failures("tensorflow", some, "float32", wrapped=by_xla)


def unknown(name: str, array: tf.Tensor, batch: int | None) -> tf.TensorSpec:
    """Return the spec of an array whose batch and lengths are unknown; a size of 1 broadcasts."""
    first, *rest = array.shape
    sizes = [1 if first == 1 else batch, *(size if size in {1, HEADS} else None for size in rest)]
    return tf.TensorSpec(array.shape if name == "sinks" else sizes, array.dtype)


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, mode) for name in OPTIONS for mode in ("eager", "graph")), ("partial", "xla")]
)
def test_outputs_gradients_and_weights_are_those_of_the_reference(name: str, mode: str) -> None:
    options, make_arguments = OPTIONS[name]
    layer, arguments = sized(**options), make_arguments()
    inputs = [tokens(3), tokens(8, options.get("k_embed", EMBED)), tokens(8, options.get("v_embed", EMBED), seed=6)]
    arrays = {name: tf.constant(value) for name, value in arguments.items() if isinstance(value, numpy.ndarray)}
    fixed = {name: value for name, value in arguments.items() if name not in arrays}

    def ours(dtype: str) -> list[tf.Tensor]:
        layer = sized(dtype, **options)
        variables = {variable.name: variable.value for variable in layer.trainable_weights}

        def results(x: list[tf.Tensor], arrays: dict[str, tf.Tensor]) -> list[tf.Tensor]:
            def call() -> tuple[tf.Tensor, tf.Tensor]:
                return layer(*x, **arrays, **fixed), layer.attention_weights(*x[:2], **weight_options(arrays | fixed))

            return with_gradients(call, [*(variables[name] for name in sorted(variables)), *x])

        if mode == "eager":
            return results(*floats((inputs, arrays), dtype))
        batch = BATCH if any(isinstance(value, list) for value in fixed.values()) else None
        specs = [tf.TensorSpec((batch, None, x.shape[2]), dtype) for x in inputs]
        like = {name: unknown(name, array, batch) for name, array in floats(arrays, dtype).items()}
        signature = (specs, like) if mode == "graph" else None
        function = tf.function(results, input_signature=signature, jit_compile=mode == "xla")
        return function(*floats((inputs, arrays), dtype))

    params = {name: param.numpy() for name, param in layer.params.items()}
    of_layer: dict[str, Any] = {name: options[name] for name in ("rotary", "norm_epsilon") if name in options}
    expected = by_reference(params, [x.numpy() for x in inputs], **of_layer, **arguments)
    assert_same(ours, [tf.constant(array) for array in expected])


def test_linear_biases_are_those_of_the_reference() -> None:
    for heads in (1, 5, 8, 12):
        slopes = mha_spec_tensorflow.alibi_slopes(heads, dtype="float64")
        assert_equal(slopes, tf.constant(reference.alibi_slopes(heads, dtype="float64")))
        for offset in (2, [1, -4], tf.constant([1, -4])):
            host = offset if isinstance(offset, (int, list)) else offset.numpy()
            expected = tensors(reference.alibi_bias(slopes.numpy(), 3, 7, q_offset=host))
            bias = partial(mha_spec_tensorflow.alibi_bias, q_len=3, kv_len=7, q_offset=offset)
            assert_equal([bias(slopes), tf.function(bias)(slopes)], [expected, expected])
