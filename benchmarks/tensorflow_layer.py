"""Compare the layer of mha_spec_tensorflow with that of Keras: ratios of processor time on the CPU.

Run it with `python benchmarks/tensorflow_layer.py`; a row past its limit fails the run.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import keras
import numpy
import tensorflow as tf
from measure import ratio

import mha_spec_tensorflow
from mha_spec.weights import load_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BATCH, LENGTH, EMBED, HEADS = 2, 512, 512, 8
LIMIT = 1 / 0.97
"""The largest ratio of a row."""
MODES: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "eager": lambda call: call,
    "tf.function": tf.function,
    "XLA": partial(tf.function, jit_compile=True),
}


def trained(call: Callable[[tf.Tensor], tf.Tensor], leaves: Sequence[Any]) -> Callable[[tf.Tensor], object]:
    """Make a function of the gradients of parameters and tokens."""

    def step(x: tf.Tensor) -> object:
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(call(x) ** 2)
        return tape.gradient(total, [x, *leaves])

    return step


def main() -> None:
    """Print every row, and the mean of all."""
    x = tf.constant(numpy.random.default_rng(7).standard_normal((BATCH, LENGTH, EMBED)), tf.float32)
    theirs: Any = keras.layers.MultiHeadAttention(HEADS, EMBED // HEADS)
    theirs(x, x)
    ours: Any = mha_spec_tensorflow.MultiHeadAttention(EMBED, HEADS)
    for name, array in load_weights(theirs.get_weights(), "keras").items():
        getattr(ours, name).assign(array)
    ratios: list[float] = []
    for mode, wrapped in MODES.items():
        for kind in ("forward", "forward and backward"):
            calls: list[Callable[[tf.Tensor], Any]] = [ours, lambda x: theirs(x, x)]
            if kind != "forward":
                leaves = ([weight.value for weight in layer.trainable_weights] for layer in (ours, theirs))
                calls = [trained(call, weights) for call, weights in zip(calls, leaves, strict=True)]
            runs = [partial(wrapped(call), x) for call in calls]
            measured, mine, other = ratio(runs[0], runs[1], clock=time.process_time)
            ratios.append(measured)
            verdict = "ok" if measured <= LIMIT else "EXCEEDED"
            print(f"{mode}, {kind:22s} {mine:9.3f} ms against {other:9.3f} ms: {measured:5.2f} {verdict}", flush=True)
    mean = math.exp(statistics.mean(map(math.log, ratios)))
    print(f"geometric mean: {1 / mean:.2f}x")
    sys.exit(max(ratios) > LIMIT)


if __name__ == "__main__":
    main()
