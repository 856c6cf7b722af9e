"""mha_spec_tensorflow where batch and lengths are not known when a call is traced: blocks, as where they are known."""

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
"""The shape of a mask of which nothing is known but that heads share it."""


@dataclass(frozen=True)
class Setting:
    """One kind of call: its plain options, and its arrays with what is known of their shapes."""

    options: dict[str, Any] = field(default_factory=dict)
    arrays: Callable[[Sizes], dict[str, numpy.ndarray]] = lambda _: {}
    shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)

    def given(self, sizes: Sizes) -> dict[str, tf.Tensor]:
        """The operands and arrays."""
        batch, q_len, kv_len = sizes
        shapes = {
            "query": (batch, HEADS, q_len, QK_DIM),
            "key": (batch, KV_HEADS, kv_len, QK_DIM),
            "value": (batch, KV_HEADS, kv_len, V_DIM),
        }
        operands = {name: numbers(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
        return {name: tf.constant(one) for name, one in (operands | self.arrays(sizes)).items()}

    def specs(
        self, batch: int | None = None, q_len: int | None = None, kv_len: int | None = None
    ) -> dict[str, tf.TensorSpec]:
        """What is known of the operands and arrays."""
        shapes = self.shapes | {
            "query": (batch, HEADS, q_len, QK_DIM),
            "key": (batch, KV_HEADS, kv_len, QK_DIM),
            "value": (batch, KV_HEADS, kv_len, V_DIM),
        }
        return {name: tf.TensorSpec(shapes[name], one.dtype) for name, one in self.given((1, 1, 1)).items()}

    def answers(self, given: dict[str, tf.Tensor]) -> list[tf.Tensor]:
        """Output, lse and the gradients of something in which every element counts differently."""
        operands = {name: one for name, one in given.items() if name in DIFFERENTIABLE}
        with tf.GradientTape() as tape:
            tape.watch(operands)
            output, lse = attention(**given, **self.options, return_lse=True)
            seeing = tf.where(tf.math.is_finite(lse), lse, tf.zeros_like(lse))
            total = tf.reduce_sum(tf.sin(3 * output)) + tf.reduce_sum(tf.cos(seeing))
        return [output, lse, *gradient_of(tape, total, operands).values()]


def lengths(sizes: Sizes) -> dict[str, numpy.ndarray]:
    """Lengths of queries and of keys, 0 and all of them among them."""
    batch, q_len, kv_len = sizes
    q_lengths, kv_lengths = (size - numpy.arange(batch) * (size // 2) for size in (q_len, kv_len))
    return {"q_lengths": q_lengths, "kv_lengths": kv_lengths}


def segments(sizes: Sizes) -> dict[str, numpy.ndarray]:
    """Segments of three."""
    batch, *both = sizes
    q_ids, kv_ids = (numpy.broadcast_to(numpy.arange(size) // 3, (batch, size)) for size in both)
    return {"q_segment_ids": q_ids, "kv_segment_ids": kv_ids}


SETTINGS = {
    "plain": Setting(),
    "causal": Setting({"causal": True, "q_offset": 1}),
    "window": Setting({"window": (3, 2), "q_offset": -1}),
    "wide window": Setting({"window": (2**30, 2**30), "q_offset": 2**30}),
    "lengths": Setting(arrays=lengths, shapes={"q_lengths": (None,), "kv_lengths": (None,)}),
    "segments": Setting(arrays=segments, shapes={"q_segment_ids": (None, None), "kv_segment_ids": (None, None)}),
    "mask": Setting(arrays=lambda one: {"mask": numbers(one[0], 1, *one[1:]) < 0.5}, shapes={"mask": BROAD}),
    "mask of keys": Setting(arrays=lambda one: {"mask": numbers(1, 1, 1, one[2]) < 0.5}, shapes={"mask": BROAD}),
    "bias": Setting(arrays=lambda one: {"bias": numbers(one[0], 1, *one[1:])}, shapes={"bias": BROAD}),
    "bias of keys": Setting(arrays=lambda one: {"bias": numbers(1, 1, 1, one[2])}, shapes={"bias": BROAD}),
    "shared bias": Setting(
        arrays=lambda one: {"bias": numbers(1, HEADS, *one[1:])}, shapes={"bias": (1, HEADS, None, None)}
    ),
    "sinks": Setting({"softcap": 2.0}, lambda _: {"sinks": numbers(HEADS)}, {"sinks": (HEADS,)}),
    "dropout mask": Setting(
        {"dropout_rate": 0.3},
        lambda one: {"dropout_mask": numbers(one[0], 1, *one[1:]) < 0.5},
        {"dropout_mask": BROAD},
    ),
    "dropout": Setting({"dropout_rate": 0.3, "dropout_key": 5}),
}
SIZES = [(2, 12, 12), (3, 13, 9), (1, 1, 20), (6, 3, 1), (2, 0, 5), (2, 5, 0), (0, 5, 5)]
"""Multiples of a block and not, less than one, and nothing."""


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut every call, however small, into blocks."""
    for name, value in {"SCORES": 128, "LOWEST": 2, "HIGHEST": 4}.items():
        monkeypatch.setattr(plan, name, value)


def traced(setting: Setting, **options: Any) -> Callable[..., list[tf.Tensor]]:
    """A function of which nothing is known but what must be."""
    return tf.function(setting.answers, input_signature=[setting.specs()], **options)


def traces(function: Any) -> int:
    """How often a function was traced."""
    return function.experimental_get_tracing_count()


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("name", SETTINGS)
def test_one_trace_serves_every_length(name: str) -> None:
    setting = SETTINGS[name]
    function = traced(setting)
    for sizes in SIZES:
        given = setting.given(sizes)
        assert_near(function(given), setting.answers(given))
    assert traces(function) == 1


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("name", ["causal", "window"])
@pytest.mark.parametrize(
    "known", [(1, None, None), (2, None, None), (2, 2, None), (None, 9, None), (None, None, 9), (None, 9, 8), (2, 0, 0)]
)
def test_some_sizes_may_be_known(known: tuple[int | None, int | None, int | None], name: str) -> None:
    setting = SETTINGS[name]
    function = tf.function(setting.answers, input_signature=[setting.specs(*known)])
    batch, q_len, kv_len = (size if one is None else one for one, size in zip(known, (4, 7, 11), strict=True))
    given = setting.given((batch, q_len, kv_len))
    assert_near(function(given), setting.answers(given))
    assert function.get_concrete_function().structured_outputs[0].shape.as_list() == [known[0], HEADS, known[1], V_DIM]


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("name", ["plain", "mask", "dropout"])
def test_the_same_blocks_are_the_same_to_the_bit(name: str) -> None:
    setting = SETTINGS[name]
    function, known = traced(setting), tf.function(setting.answers)
    for sizes in SIZES[:3]:
        given = setting.given(sizes)
        for one, other in zip(function(given), known(given), strict=True):
            assert numpy.array_equal(one, other)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("name", ["window", "bias of keys"])
def test_compiled_by_xla(name: str) -> None:
    setting = SETTINGS[name]
    function = traced(setting, jit_compile=True)
    for sizes in SIZES[:2]:
        given = setting.given(sizes)
        assert_near(function(given), setting.answers(given))
    assert traces(function) == 1


def called(name: str, **options: Any) -> Callable[..., tf.Tensor]:
    """Attention to its three operands alone, and what is known of them."""
    specs = SETTINGS["plain"].specs()
    signature = [specs[one] for one in ("query", "key", "value")]
    return tf.function(lambda *given: attention(*given, **SETTINGS[name].options), input_signature=signature, **options)


def operands(sizes: Sizes) -> list[tf.Tensor]:
    """Query, key and value."""
    return list(SETTINGS["plain"].given(sizes).values())


def derived(call: Callable[..., tf.Tensor], given: list[tf.Tensor]) -> list[tf.Tensor]:
    """Second derivatives of something that is not linear."""
    with tf.GradientTape() as outer:
        outer.watch(given)
        with tf.GradientTape() as inner:
            inner.watch(given)
            total = tf.reduce_sum(tf.sin(call(*given)))
        total = tf.add_n([tf.reduce_sum(tf.sin(3 * one)) for one in gradient_of(inner, total, given)])
    return gradient_of(outer, total, given)


@pytest.mark.usefixtures("cut")
def test_second_derivatives() -> None:
    given = operands(SIZES[1])
    expected = derived(lambda *given: attention(*given, **SETTINGS["window"].options), given)
    assert_near(derived(called("window"), given), expected)


@pytest.mark.usefixtures("cut")
def test_a_tape_outside_of_what_xla_compiles() -> None:
    function, given = called("causal", jit_compile=True), operands(SIZES[1])
    found = []
    for call in (function, lambda *given: attention(*given, **SETTINGS["causal"].options)):
        with tf.GradientTape() as tape:
            tape.watch(given)
            total = tf.reduce_sum(tf.sin(call(*given)))
        found.append(gradient_of(tape, total, given))
    assert_near(*found)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("mapping", [tf.map_fn, tf.vectorized_map])
def test_mapped(mapping: Callable[..., tf.Tensor]) -> None:
    options = SETTINGS["window"].options
    signature = [tf.TensorSpec((None, *one.shape), one.dtype) for one in SETTINGS["plain"].specs().values()]
    keywords = {"fn_output_signature": tf.float64} if mapping is tf.map_fn else {"fallback_to_while_loop": False}

    @tf.function(input_signature=signature)
    def mapped(*given: tf.Tensor) -> tf.Tensor:
        return mapping(lambda one: attention(*one, **options), given, **keywords)

    for sizes in SIZES[:3]:
        given = operands(sizes)
        found = mapped(*(tf.stack([tf.reverse(one, [0]), one]) for one in given))
        assert_near([found[1]], [attention(*given, **options)])


@pytest.mark.usefixtures("cut")
def test_the_gradient_of_a_loop_is_compiled_by_xla() -> None:
    """What a loop keeps for its gradient is no size that XLA knows."""

    def mapped(*given: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(given)
            found = tf.map_fn(
                lambda one: attention(*one, **SETTINGS["causal"].options), given, fn_output_signature=tf.float64
            )
            total = tf.reduce_sum(tf.sin(found))
        return list(gradient_of(tape, total, given))

    given = [tf.stack([tf.reverse(one, [0]), one]) for one in operands(SIZES[1])]
    signature = [tf.TensorSpec((None, *one.shape), one.dtype) for one in SETTINGS["plain"].specs().values()]
    assert_near(tf.function(mapped, input_signature=signature, jit_compile=True)(*given), mapped(*given))


def arguments(batch: int | None, q_len: int | None, kv_len: int | None) -> Arguments:
    """A call of 8 heads, without numbers."""
    query, key = (tf.TensorSpec((batch, 8, length, 64)) for length in (q_len, kv_len))
    return Arguments(query, key, key)


def described(runs: Sequence[plan.Run]) -> list[Any]:
    """The sizes and numbers of the blocks."""
    groups = [[[one.first, one.rows, one.keys, one.count] for one in run.groups] for run in runs]
    return [[run.first, run.count, run.entries, group] for run, group in zip(runs, groups, strict=True)]


@pytest.mark.parametrize(
    "sizes", [(1, 8192, 8192), (8, 512, 512), (6, 1000, 1500), (31, 3000, 20000), (64, 128, 100), (2, 1, 2048)]
)
def test_the_blocks_are_those_of_known_lengths(sizes: Sizes) -> None:
    function = tf.function(lambda *given: described(plan.unknown_plan(plan.Known(arguments(None, None, None)), *given)))
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
def step(*given):
    with tf.GradientTape() as tape:
        tape.watch(given)
        total = tf.reduce_sum(attention(*given, causal=True))
    return tape.gradient(total, given)

def most(length):
    step(*[tf.zeros((1, 1, length, 8))] * 3)
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = most(64)
print(most(int(os.environ["LENGTH"])) - before)
"""
"""How much more memory a greater length takes, forward and backward; perhaps in blocks of another height."""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says how much memory a process had at most.")
def test_memory_grows_with_the_length(python: Callable[..., Any]) -> None:
    """All pairs are 256 MiB in float32, which one block, were it as high as there are queries, holds."""
    length = 8192
    pairs = 4 * length**2
    assert int(python(GROWTH, LENGTH=str(length)).stdout) < pairs / 2
    assert int(python(GROWTH, LENGTH=str(length), HEIGHT=str(length)).stdout) > pairs
