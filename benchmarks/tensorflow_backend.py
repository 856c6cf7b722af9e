"""mha_spec_tensorflow against Keras and the direct formula: ratios of interleaved medians on the CPU, in a tf.function.

Run it with `python -P benchmarks/tensorflow_backend.py [NAME ...]`; a row past its limit fails the run. With `--cpu`
the time is that of the processor, for a machine which others use.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import keras
import numpy
import tensorflow as tf

import mha_spec_tensorflow

if TYPE_CHECKING:
    from collections.abc import Callable

attention: Callable[..., Any] = mha_spec_tensorflow.attention
gradient_of: Callable[..., Any] = tf.GradientTape.gradient
SECONDS = 3.0
"""How long each row is measured."""
FORMULA = 1 / 0.97


@dataclass(frozen=True)
class Setting:
    """One kind of call: its sizes, our options, and the mask that says the same."""

    query: tuple[int, int, int, int]
    kv: tuple[int, int]
    """kv_heads and kv_len."""
    options: dict[str, object] = field(default_factory=dict)
    mask: Callable[[], numpy.ndarray] | None = None
    step: bool = False
    """A decode step, which has no backward."""
    dtype: str = "float32"
    keras: bool = False
    """Whether Keras is asked as well."""

    def operands(self) -> list[Any]:
        """Query, key and value of standard normal numbers."""
        batch, _, _, size = self.query
        random = numpy.random.default_rng(7)
        shapes = self.query, (batch, *self.kv, size), (batch, *self.kv, size)
        return [tf.cast(random.normal(size=shape), self.dtype) for shape in shapes]


def near(length: int, left: int) -> numpy.ndarray:
    """The mask of a causal window."""
    distance = numpy.arange(length) - numpy.arange(length)[:, None]
    return ((distance <= 0) & (distance >= -left))[None, None]


def padding(lengths: list[int], length: int) -> numpy.ndarray:
    """The mask of lengths."""
    return (numpy.arange(length) < numpy.array(lengths)[:, None])[:, None, None, :]


def packing(ids: numpy.ndarray) -> numpy.ndarray:
    """The mask of segments."""
    return ids[:, None, :, None] == ids[:, None, None, :]


LENGTHS = [512, 448, 384, 320, 192, 128, 64, 1]
IDS = numpy.arange(4096)[None] // 256
LONG = (1, 8, 2048, 64)
SETTINGS = {
    "encoder": Setting((2, 8, 512, 64), (8, 512), keras=True),
    "encoder in bfloat16": Setting((2, 8, 512, 64), (8, 512), dtype="bfloat16", keras=True),
    "long": Setting(LONG, (8, 2048), keras=True),
    "long in bfloat16": Setting(LONG, (8, 2048), dtype="bfloat16", keras=True),
    "causal": Setting(LONG, (8, 2048), {"causal": True}, lambda: near(2048, 2048)),
    "decode": Setting((8, 32, 1, 128), (8, 2048), step=True),
    "cross": Setting((2, 8, 128, 64), (8, 1500)),
    "window": Setting((1, 8, 4096, 64), (8, 4096), {"window": (256, 0)}, lambda: near(4096, 256)),
    "padded": Setting((8, 8, 512, 64), (8, 512), {"kv_lengths": LENGTHS}, lambda: padding(LENGTHS, 512)),
    "packed": Setting((1, 8, 4096, 64), (8, 4096), {"q_segment_ids": IDS, "kv_segment_ids": IDS}, lambda: packing(IDS)),
    "multi-query": Setting((2, 8, 512, 64), (1, 512)),
}


def direct(query: Any, key: Any, value: Any, mask: Any) -> Any:
    """Einsum, softmax, einsum."""
    group = query.shape[1] // key.shape[1]
    key, value = (tf.repeat(one, group, 1) if group > 1 else one for one in (key, value))
    scores = tf.einsum("bhqd,bhkd->bhqk", query, key) * query.shape[3] ** -0.5
    if mask is not None:
        scores = tf.where(mask, scores, tf.constant(-numpy.inf, scores.dtype))
    return tf.einsum("bhqk,bhkd->bhqd", tf.nn.softmax(scores), value)


def by_keras(query: Any, key: Any, value: Any) -> Any:
    """Keras's own, whose axes are (batch, length, heads, size)."""
    return keras.ops.dot_product_attention(query, key, value)


def trained(function: Callable[..., Any]) -> Callable[..., Any]:
    """Forward and backward."""

    def step(*operands: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(operands)
            number = tf.reduce_sum(function(*operands))
        return gradient_of(tape, number, operands)

    return step


def timed(function: Callable[[], object]) -> float:
    """Run once, in seconds."""
    clock = time.process_time if "--cpu" in sys.argv else time.perf_counter
    start = clock()
    function()
    return clock() - start


def ratio(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float, float]:
    """The median of the ratios of runs in turn, and both medians in ms."""
    pairs: list[tuple[float, float]] = []
    for _ in range(2):
        timed(ours)
        timed(theirs)
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(pairs) < 5:
        pairs.append((timed(ours), timed(theirs)))
    mine, other = (statistics.median(one) * 1000 for one in zip(*pairs, strict=True))
    return statistics.median(a / b for a, b in pairs), mine, other


def report(name: str, limit: float, measured: tuple[float, float, float]) -> bool:
    """Print a row; whether it is within its limit."""
    found, mine, other = measured
    verdict = "ok" if found <= limit else "EXCEEDED"
    print(f"{name:50s} {mine:9.3f} ms against {other:9.3f} ms: {found:5.2f}  limit {limit:.2f} {verdict}", flush=True)
    return found <= limit


def compare(name: str, setting: Setting) -> bool:
    """Every row of one setting."""
    operands, good = setting.operands(), True
    mask = None if setting.mask is None else tf.constant(setting.mask())

    def ours(*operands: Any) -> Any:
        return attention(*operands, **setting.options)

    rows: dict[str, tuple[Callable[..., Any], list[Any], float]] = {
        "direct": (partial(direct, mask=mask), operands, FORMULA)
    }
    if setting.keras:
        rows["keras"] = by_keras, [tf.transpose(one, (0, 2, 1, 3)) for one in operands], 1.0
    for other, (theirs, given, limit) in rows.items():
        measured = ratio(partial(tf.function(ours), *operands), partial(tf.function(theirs), *given))
        good &= report(f"{name}, forward, {other}", limit, measured)
        if other == "direct" and not setting.step:
            both = [tf.function(trained(one)) for one in (ours, theirs)]
            measured = ratio(partial(both[0], *operands), partial(both[1], *given))
            good &= report(f"{name}, forward and backward, {other}", limit, measured)
    return good


def memory() -> bool:
    """How many times n the largest tensor of a graph holds at n = 8192, forward and backward."""
    length = 8192
    specs = [tf.TensorSpec((1, 8, length, 64))] * 3
    graph = tf.function(trained(attention)).get_concrete_function(*specs).graph.as_graph_def(add_shapes=True)
    nodes = [*graph.node, *(node for one in graph.library.function for node in one.node_def)]
    shapes = [shape for node in nodes for shape in node.attr["_output_shapes"].list.shape]
    largest = max(numpy.prod([axis.size for axis in shape.dim]) for shape in shapes)
    print(f"largest tensor at {length}: {largest:.3g} numbers, of 8 n^2 = {8 * length**2:.3g}")
    return bool(largest <= 2**23)


def main() -> None:
    """Print every row, or those of the settings named."""
    names = [name for name in sys.argv[1:] if name != "--cpu"] or [*SETTINGS, "memory"]
    good = [memory() if name == "memory" else compare(name, SETTINGS[name]) for name in names]
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
