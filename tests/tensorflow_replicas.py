"""Attention in a tf.distribute.MirroredStrategy over two devices of the CPU; test_tensorflow_replicas runs this file.

It prints a JSON object with a list of faults, or a message, for each name.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy
import tensorflow as tf
from support.comparisons import largest_difference
from support.numbers import numbers

import mha_spec_tensorflow
from mha_spec.errors import ArgumentTypeError

REPLICAS, BATCH, HEADS, EMBED = 2, 6, 4, 7
RESOLUTION = 2.0**-23
"""The distance of two float64 results is far below the resolution of float32, and that of two meanings far above."""
(device,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(device, [tf.config.LogicalDeviceConfiguration()] * REPLICAS)
strategy = tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(REPLICAS)])


def of_replicas(*arrays: numpy.ndarray) -> list[Any]:
    """Split arrays over the batch."""
    parts = [numpy.split(array, REPLICAS) for array in arrays]
    place = strategy.experimental_distribute_values_from_function
    return [place(lambda context, x=x: tf.constant(x[context.replica_id_in_sync_group])) for x in parts]


def faults(replicas: Any, whole: Any) -> list[str]:
    """Compare the joined results of the replicas with those of a single device."""
    results = [tf.concat(strategy.experimental_local_results(result), 0) for result in replicas]
    pairs = enumerate(zip(results, whole, strict=True))
    return [f"result {place}" for place, (x, y) in pairs if x.dtype != y.dtype or largest_difference(x, y) > RESOLUTION]


def functions() -> dict[str, Any]:
    """Compare output, lse and gradients, in eager mode, in a graph and as an XLA program."""
    shapes = (BATCH, HEADS, 5, 11), (BATCH, 2, 13, 11), (BATCH, 2, 13, 3)
    operands = [numbers(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    operands.append(numpy.asarray([13, 7, 0, 2, 11, 5], numpy.int32))

    def step(query: Any, key: Any, value: Any, lengths: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch((query, key, value))
            options: Any = {"causal": True, "q_offset": 8, "kv_lengths": lengths, "return_lse": True}
            output, lse = mha_spec_tensorflow.attention(query, key, value, **options)
            total = tf.reduce_sum(output**2)
        return output, lse, *tape.gradient(total, (query, key, value))

    whole, split = step(*map(tf.constant, operands)), of_replicas(*operands)
    steps = {"eager": step, "graph": tf.function(step), "xla": tf.function(step, jit_compile=True)}
    return {name: faults(strategy.run(call, split), whole) for name, call in steps.items()}


def layer() -> dict[str, Any]:
    """Compare the gradients of mirrored parameters, summed over the replicas, with those of a single device."""
    with strategy.scope():
        module = mha_spec_tensorflow.MultiHeadAttention(EMBED, HEADS, qk_dim=3, dtype="float64")
        module.build((None, 5, EMBED))
    x = numbers(BATCH, 5, EMBED)

    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            output = module(x, causal=True)
            total = tf.reduce_sum(output**2)
        return output, *tape.gradient(total, module.trainable_variables)

    def summed(x: Any) -> Any:
        output, *gradients = step(x)
        return output, *tf.distribute.get_replica_context().all_reduce("sum", gradients)

    output, *gradients = tf.function(lambda x: strategy.run(summed, (x,)))(*of_replicas(x))
    whole_output, *expected = step(tf.constant(x))
    of_first = [strategy.experimental_local_results(gradient)[0] for gradient in gradients]
    return {"layer": faults([output], [whole_output]), "parameters": faults(of_first, expected)}


def refusal() -> dict[str, Any]:
    """Return the message of the error for values of all replicas outside of a replica."""
    try:
        mha_spec_tensorflow.attention(*of_replicas(*[numbers(BATCH, HEADS, 5, 3)] * 3))
    except ArgumentTypeError as error:
        return {"refusal": str(error)}
    return {"refusal": "no error"}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(functions() | layer() | refusal()))
