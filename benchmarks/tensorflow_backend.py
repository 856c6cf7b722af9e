"""Compare mha_spec_tensorflow with Keras and the direct formula: ratios of interleaved medians on the CPU, in a graph.

Run it with `python benchmarks/tensorflow_backend.py [NAME ...]`; a row past its limit fails the run. Rows in bfloat16
have no limit: the others round the scores, and on the CPU TensorFlow has no exact product of bfloat16 matrices.
With `--cpu` processor time is measured, for a machine that other processes use.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import keras
import numpy
import tensorflow as tf
from measure import ratio, report
from settings import SETTINGS, Setting

import mha_spec_tensorflow

if TYPE_CHECKING:
    from collections.abc import Callable

attention: Callable[..., Any] = mha_spec_tensorflow.attention
gradient_of: Callable[..., Any] = tf.GradientTape.gradient
FORMULA = 1 / 0.97
"""The largest ratio to the time of the direct formula."""
KERAS = ("encoder", "long")
"""The settings in which Keras is also measured, and which are repeated in bfloat16."""
ROWS = {name: (setting, "float32") for name, setting in SETTINGS.items()}
ROWS |= {f"{name} in bfloat16": (SETTINGS[name], "bfloat16") for name in KERAS}


def direct(query: Any, key: Any, value: Any, mask: Any) -> Any:
    """Compute the formula."""
    group = query.shape[1] // key.shape[1]
    key, value = (tf.repeat(x, group, 1) if group > 1 else x for x in (key, value))
    scores = tf.einsum("bhqd,bhkd->bhqk", query, key) * query.shape[3] ** -0.5
    if mask is not None:
        scores = tf.where(mask, scores, tf.constant(-numpy.inf, scores.dtype))
    return tf.einsum("bhqk,bhkd->bhqd", tf.nn.softmax(scores), value)


def by_keras(query: Any, key: Any, value: Any) -> Any:
    """Call Keras, whose axes are (batch, length, heads, size)."""
    return keras.ops.dot_product_attention(query, key, value)


def trained(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of forward and backward."""

    def step(*operands: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(operands)
            number = tf.reduce_sum(function(*operands))
        return gradient_of(tape, number, operands)

    return step


def compare(name: str, setting: Setting, dtype: str) -> bool:
    """Measure every row of a setting."""
    clock = time.process_time if "--cpu" in sys.argv else time.perf_counter
    operands, good = [tf.cast(operand, dtype) for operand in setting.operands()], True
    mask = None if setting.visible is None else tf.constant(setting.visible)
    options = setting.options(numpy.asarray)

    def ours(*operands: Any) -> Any:
        """Call attention with host arrays; a tf.function would convert those of a `partial` to tensors."""
        return attention(*operands, **options)

    rows: dict[str, tuple[Callable[..., Any], list[Any], float]] = {
        "direct": (partial(direct, mask=mask), operands, FORMULA)
    }
    if setting.name in KERAS:
        rows["keras"] = by_keras, [tf.transpose(operand, (0, 2, 1, 3)) for operand in operands], 1.0
    for rival, (theirs, inputs, largest) in rows.items():
        limit = largest if dtype == "float32" else None
        measured = ratio(partial(tf.function(ours), *operands), partial(tf.function(theirs), *inputs), clock=clock)
        good &= report(f"{name}, forward, {rival}", limit, measured)
        if rival == "direct" and not setting.step:
            our_step, their_step = (tf.function(trained(call)) for call in (ours, theirs))
            measured = ratio(partial(our_step, *operands), partial(their_step, *inputs), clock=clock)
            good &= report(f"{name}, forward and backward, {rival}", limit, measured)
    return good


def memory() -> bool:
    """Check that the largest tensor of forward and backward grows with the length, not with its square."""
    length = 8192
    specs = [tf.TensorSpec((1, 8, length, 64))] * 3
    graph = tf.function(trained(attention)).get_concrete_function(*specs).graph.as_graph_def(add_shapes=True)
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    shapes = [shape for node in nodes for shape in node.attr["_output_shapes"].list.shape]
    largest = max(numpy.prod([axis.size for axis in shape.dim]) for shape in shapes)
    print(f"largest tensor at {length}: {largest:.3g} numbers, of 8 n^2 = {8 * length**2:.3g}")
    return bool(largest <= 2**23)


def main() -> None:
    """Print every row, or those of the settings named."""
    names = [name for name in sys.argv[1:] if name != "--cpu"] or [*ROWS, "memory"]
    good = [memory() if name == "memory" else compare(name, *ROWS[name]) for name in names]
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
