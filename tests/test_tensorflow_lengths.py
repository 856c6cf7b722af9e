"""mha_spec_tensorflow where batch and lengths are unknown when a call is traced: it uses the same blocks."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import tensorflow as tf
from support.comparisons import assert_near
from support.numbers import numbers

import mha_spec_tensorflow
from mha_spec.arguments import Arguments
from mha_spec_tensorflow import plan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

attention: Callable[..., Any] = mha_spec_tensorflow.attention
gradient_of: Callable[..., Any] = tf.GradientTape.gradient
HEADS, KV_HEADS, QK_DIM, V_DIM = 4, 2, 5, 3
DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks")
Sizes = tuple[int, int, int]
"""Batch, q_len and kv_len."""
BROAD = (None, 1, None, None)
"""The shape of a mask that all heads share; its other sizes are unknown."""


@dataclass(frozen=True)
class Setting:
    """A kind of call: its plain options, its arrays, and the known sizes of these."""

    options: dict[str, Any] = field(default_factory=dict)
    arrays: Callable[[Sizes], dict[str, numpy.ndarray]] = lambda _: {}
    shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)

    def tensors(self, sizes: Sizes) -> dict[str, tf.Tensor]:
        """Make the operands and the other arrays."""
        batch, q_len, kv_len = sizes
        shapes = {
            "query": (batch, HEADS, q_len, QK_DIM),
            "key": (batch, KV_HEADS, kv_len, QK_DIM),
            "value": (batch, KV_HEADS, kv_len, V_DIM),
        }
        operands = {name: numbers(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
        return {name: tf.constant(array) for name, array in (operands | self.arrays(sizes)).items()}

    def specs(
        self, batch: int | None = None, q_len: int | None = None, kv_len: int | None = None
    ) -> dict[str, tf.TensorSpec]:
        """Return the specs of the operands and arrays; None is an unknown size."""
        shapes = self.shapes | {
            "query": (batch, HEADS, q_len, QK_DIM),
            "key": (batch, KV_HEADS, kv_len, QK_DIM),
            "value": (batch, KV_HEADS, kv_len, V_DIM),
        }
        return {name: tf.TensorSpec(shapes[name], tensor.dtype) for name, tensor in self.tensors((1, 1, 1)).items()}

    def results(self, tensors: dict[str, tf.Tensor]) -> list[tf.Tensor]:
        """Compute output, lse and the gradients of a number to which every element contributes differently."""
        operands = {name: tensor for name, tensor in tensors.items() if name in DIFFERENTIABLE}
        with tf.GradientTape() as tape:
            tape.watch(operands)
            output, lse = attention(**tensors, **self.options, return_lse=True)
            finite = tf.where(tf.math.is_finite(lse), lse, tf.zeros_like(lse))
            total = tf.reduce_sum(tf.sin(3 * output)) + tf.reduce_sum(tf.cos(finite))
        return [output, lse, *gradient_of(tape, total, operands).values()]


def lengths(sizes: Sizes) -> dict[str, numpy.ndarray]:
    """Make lengths of queries and of keys, from all of them down to 0."""
    batch, q_len, kv_len = sizes
    q_lengths, kv_lengths = (size - numpy.arange(batch) * (size // 2) for size in (q_len, kv_len))
    return {"q_lengths": q_lengths, "kv_lengths": kv_lengths}


def segments(sizes: Sizes) -> dict[str, numpy.ndarray]:
    """Make segments of three tokens."""
    batch, *lengths = sizes
    q_ids, kv_ids = (numpy.broadcast_to(numpy.arange(length) // 3, (batch, length)) for length in lengths)
    return {"q_segment_ids": q_ids, "kv_segment_ids": kv_ids}


SETTINGS = {
    "plain": Setting(),
    "causal": Setting({"causal": True, "q_offset": 1}),
    "window": Setting({"window": (3, 2), "q_offset": -1}),
    "wide window": Setting({"window": (2**30, 2**30), "q_offset": 2**30}),
    "lengths": Setting(arrays=lengths, shapes={"q_lengths": (None,), "kv_lengths": (None,)}),
    "segments": Setting(arrays=segments, shapes={"q_segment_ids": (None, None), "kv_segment_ids": (None, None)}),
    "mask": Setting(arrays=lambda n: {"mask": numbers(n[0], 1, *n[1:]) < 0.5}, shapes={"mask": BROAD}),
    "mask of keys": Setting(arrays=lambda n: {"mask": numbers(1, 1, 1, n[2]) < 0.5}, shapes={"mask": BROAD}),
    "bias": Setting(arrays=lambda n: {"bias": numbers(n[0], 1, *n[1:])}, shapes={"bias": BROAD}),
    "bias of keys": Setting(arrays=lambda n: {"bias": numbers(1, 1, 1, n[2])}, shapes={"bias": BROAD}),
    "shared bias": Setting(
        arrays=lambda n: {"bias": numbers(1, HEADS, *n[1:])}, shapes={"bias": (1, HEADS, None, None)}
    ),
    "sinks": Setting({"softcap": 2.0}, lambda _: {"sinks": numbers(HEADS)}, {"sinks": (HEADS,)}),
    "dropout mask": Setting(
        {"dropout_rate": 0.3},
        lambda n: {"dropout_mask": numbers(n[0], 1, *n[1:]) < 0.5},
        {"dropout_mask": BROAD},
    ),
    "dropout": Setting({"dropout_rate": 0.3, "dropout_key": 5}),
}
SIZES = [(2, 12, 12), (3, 13, 9), (1, 1, 20), (6, 3, 1), (2, 0, 5), (2, 5, 0), (0, 5, 5)]
"""Lengths that are multiples of a block, others, shorter than a block, and 0."""


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut every call, however small, into blocks."""
    for name, value in {"SCORES": 128, "LOWEST": 2, "HIGHEST": 4}.items():
        monkeypatch.setattr(plan, name, value)


def traced(setting: Setting, **options: Any) -> Callable[..., list[tf.Tensor]]:
    """Make a function whose batch and lengths are unknown."""
    return tf.function(setting.results, input_signature=[setting.specs()], **options)


def traces(function: Any) -> int:
    """Count how often a function was traced."""
    return function.experimental_get_tracing_count()


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("name", SETTINGS)
def test_one_trace_serves_every_length(name: str) -> None:
    setting = SETTINGS[name]
    function = traced(setting)
    for sizes in SIZES:
        tensors = setting.tensors(sizes)
        assert_near(function(tensors), setting.results(tensors))
    assert traces(function) == 1


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("name", ["causal", "window"])
@pytest.mark.parametrize(
    "known", [(1, None, None), (2, None, None), (2, 2, None), (None, 9, None), (None, None, 9), (None, 9, 8), (2, 0, 0)]
)
def test_some_sizes_may_be_known(known: tuple[int | None, int | None, int | None], name: str) -> None:
    setting = SETTINGS[name]
    function = tf.function(setting.results, input_signature=[setting.specs(*known)])
    batch, q_len, kv_len = (size if fixed is None else fixed for fixed, size in zip(known, (4, 7, 11), strict=True))
    tensors = setting.tensors((batch, q_len, kv_len))
    assert_near(function(tensors), setting.results(tensors))
    assert function.get_concrete_function().structured_outputs[0].shape.as_list() == [known[0], HEADS, known[1], V_DIM]


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("name", ["plain", "mask", "dropout"])
def test_the_same_blocks_are_the_same_to_the_bit(name: str) -> None:
    setting = SETTINGS[name]
    function, known = traced(setting), tf.function(setting.results)
    for sizes in SIZES[:3]:
        tensors = setting.tensors(sizes)
        for result, other in zip(function(tensors), known(tensors), strict=True):
            assert numpy.array_equal(result, other)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("name", ["window", "bias of keys"])
def test_compiled_by_xla(name: str) -> None:
    setting = SETTINGS[name]
    function = traced(setting, jit_compile=True)
    for sizes in SIZES[:2]:
        tensors = setting.tensors(sizes)
        assert_near(function(tensors), setting.results(tensors))
    assert traces(function) == 1


def called(name: str, **options: Any) -> Callable[..., tf.Tensor]:
    """Make a function of query, key and value, whose batch and lengths are unknown."""
    specs, fixed = SETTINGS["plain"].specs(), SETTINGS[name].options
    signature = [specs[operand] for operand in ("query", "key", "value")]
    return tf.function(lambda *operands: attention(*operands, **fixed), input_signature=signature, **options)


def operands(sizes: Sizes) -> list[tf.Tensor]:
    """Make query, key and value."""
    return list(SETTINGS["plain"].tensors(sizes).values())


def derived(call: Callable[..., tf.Tensor], x: list[tf.Tensor]) -> list[tf.Tensor]:
    """Compute second derivatives of a number that is not linear in the output."""
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            total = tf.reduce_sum(tf.sin(call(*x)))
        total = tf.add_n([tf.reduce_sum(tf.sin(3 * gradient)) for gradient in gradient_of(inner, total, x)])
    return gradient_of(outer, total, x)


@pytest.mark.usefixtures("cut")
def test_second_derivatives() -> None:
    x = operands(SIZES[1])
    expected = derived(lambda *x: attention(*x, **SETTINGS["window"].options), x)
    assert_near(derived(called("window"), x), expected)


@pytest.mark.usefixtures("cut")
def test_a_tape_outside_of_a_function_that_xla_compiles() -> None:
    function, x = called("causal", jit_compile=True), operands(SIZES[1])
    gradients = []
    for call in (function, lambda *x: attention(*x, **SETTINGS["causal"].options)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(tf.sin(call(*x)))
        gradients.append(gradient_of(tape, total, x))
    assert_near(*gradients)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("mapping", [tf.map_fn, tf.vectorized_map])
def test_mapped(mapping: Callable[..., tf.Tensor]) -> None:
    options = SETTINGS["window"].options
    signature = [tf.TensorSpec((None, *spec.shape), spec.dtype) for spec in SETTINGS["plain"].specs().values()]
    keywords = {"fn_output_signature": tf.float64} if mapping is tf.map_fn else {"fallback_to_while_loop": False}

    @tf.function(input_signature=signature)
    def mapped(*stacks: tf.Tensor) -> tf.Tensor:
        return mapping(lambda x: attention(*x, **options), stacks, **keywords)

    for sizes in SIZES[:3]:
        x = operands(sizes)
        outputs = mapped(*(tf.stack([tf.reverse(operand, [0]), operand]) for operand in x))
        assert_near([outputs[1]], [attention(*x, **options)])


@pytest.mark.usefixtures("cut")
def test_the_gradient_of_a_loop_is_compiled_by_xla() -> None:
    """XLA does not know the size of the stack that a loop keeps for its gradient."""

    def mapped(*stacks: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(stacks)
            outputs = tf.map_fn(
                lambda x: attention(*x, **SETTINGS["causal"].options), stacks, fn_output_signature=tf.float64
            )
            total = tf.reduce_sum(tf.sin(outputs))
        return list(gradient_of(tape, total, stacks))

    stacks = [tf.stack([tf.reverse(operand, [0]), operand]) for operand in operands(SIZES[1])]
    signature = [tf.TensorSpec((None, *spec.shape), spec.dtype) for spec in SETTINGS["plain"].specs().values()]
    assert_near(tf.function(mapped, input_signature=signature, jit_compile=True)(*stacks), mapped(*stacks))


def arguments(batch: int | None, q_len: int | None, kv_len: int | None) -> Arguments:
    """Make the arguments of a call of 8 heads from specs."""
    query, key = (tf.TensorSpec((batch, 8, length, 64)) for length in (q_len, kv_len))
    return Arguments(query, key, key)


def described(runs: Sequence[plan.Run]) -> list[Any]:
    """Return the sizes and numbers of the blocks."""
    sizes = [[[group.first, group.rows, group.keys, group.count] for group in run.groups] for run in runs]
    return [[run.first, run.count, run.entries, groups] for run, groups in zip(runs, sizes, strict=True)]


@pytest.mark.parametrize(
    "sizes", [(1, 8192, 8192), (8, 512, 512), (6, 1000, 1500), (31, 3000, 20000), (64, 128, 100), (2, 1, 2048)]
)
def test_the_blocks_are_those_of_known_lengths(sizes: Sizes) -> None:
    known = plan.Known(arguments(None, None, None))
    function = tf.function(lambda *sizes: described(plan.unknown_plan(known, *sizes)))
    (run,) = tf.nest.map_structure(int, function(*map(tf.constant, sizes)))
    expected = described(plan.plan_of(plan.Known(arguments(*sizes))))
    assert [*run[:3], [group for group in run[3] if group[1] * group[3]]] == expected[0]


GROWTH = """
import os
import re
from pathlib import Path
import tensorflow as tf
from mha_spec_tensorflow import attention, plan

if "HEIGHT" in os.environ:
    plan.LOWEST = plan.HIGHEST = int(os.environ["HEIGHT"])

@tf.function(input_signature=[tf.TensorSpec((None, 1, None, 8))] * 3)
def step(*x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        total = tf.reduce_sum(attention(*x, causal=True))
    return tape.gradient(total, x)

def most(length):
    step(*[tf.zeros((1, 1, length, 8))] * 3)
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = most(64)
print(most(int(os.environ["LENGTH"])) - before)
"""
"""Measure how much more memory a longer sequence takes, forward and backward, in blocks of the height HEIGHT."""


@pytest.mark.skipif(sys.platform != "linux", reason="Only Linux tells the largest memory of a process.")
def test_memory_grows_with_the_length(python: Callable[..., Any]) -> None:
    """Blocks need less memory than the scores of all pairs, 256 MiB in float32; a block over all queries needs more.

    The order in which TensorFlow's threads take and free memory changes the result: it was 70 to 118 MiB with blocks,
    and 837 MiB with a block over all queries.
    """
    length = 8192
    pairs = 4 * length**2
    assert int(python(GROWTH, LENGTH=str(length)).stdout) < pairs
    assert int(python(GROWTH, LENGTH=str(length), HEIGHT=str(length)).stdout) > pairs
