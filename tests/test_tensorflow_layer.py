"""The layer in the worlds of TensorFlow, judged by the goldens and by the reference."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import keras
import numpy
import pytest
import tensorflow as tf
import torch

import mha_spec
import mha_spec_tensorflow
from mha_spec import ArgumentValueError, KVCache
from mha_spec.parameters import AXES
from mha_spec_conformance.accuracy import allowances
from mha_spec_conformance.calls import arranged, joined, layer_answers
from mha_spec_conformance.cases import load
from mha_spec_conformance.compare import judge
from mha_spec_conformance.convert import to_library, to_numpy
from mha_spec_conformance.precision import precision
from mha_spec_tensorflow import MultiHeadAttention, append_cache, empty_cache
from mha_spec_tensorflow.layer import store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from mha_spec_conformance.cases import Case

reference: Any = mha_spec.reference
multi_head_attention: Callable[..., Any] = mha_spec_tensorflow.multi_head_attention
BATCH, LENGTH, EMBED, HEADS, KV_HEADS, QK_DIM, V_DIM, OUT = 2, 11, 7, 6, 3, 4, 5, 13
FUNCTIONS = ("multi_head_attention", "multi_head_attention_weights", "rotary_embedding")
HOST = ("cache_lengths", "kv_lengths", "q_lengths", "q_offset", "positions")


# Goldens.


@lru_cache(maxsize=1)
def cases() -> tuple[Case, ...]:
    return tuple(case for case in load().cases if case.function in FUNCTIONS and case.expect == "values")


def chosen(*names: str) -> list[Case]:
    """For each name of an input or option, or for each that there is, a case of every function that has it."""
    found = {case.id: {*case.options, *case.input_names} for case in cases()}
    wanted = names or sorted(set().union(*found.values()))
    firsts = (
        next((case for case in cases() if case.function == function and name in found[case.id]), None)
        for name in wanted
        for function in FUNCTIONS
    )
    return list({case.id: case for case in firsts if case is not None}.values())


def arguments_of(case: Case, dtype: str, host: Iterable[str] = ()) -> dict[str, Any]:
    """The arguments of a case, some of them as NumPy arrays, with its options."""
    options = {name: tuple(value) if name == "window" else value for name, value in case.options.items()}
    arrays = case.inputs(dtype).items()
    return {name: array if name in host else to_library(array, "tensorflow") for name, array in arrays} | options


def traced(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Calls in a tf.function to which every tensor is an argument, and nothing else is."""

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def compiled(*operands: Any, **keywords: Any) -> Any:
            arrays = {name: one for name, one in keywords.items() if any(map(tf.is_tensor, tf.nest.flatten(one)))}
            rest = {name: one for name, one in keywords.items() if name not in arrays}
            asked = tf.function(lambda operands, arrays: call(*operands, **arrays, **rest), **options)
            return asked(operands, arrays)

        return compiled

    return wrapped


def answered(case: Case, arguments: dict[str, Any], wrapped: Callable[..., Any] | None = None) -> dict[str, Any]:
    """The outputs of a case by name."""
    call = getattr(mha_spec_tensorflow, case.function)
    asked = call if wrapped is None else wrapped(call)
    if case.function != "rotary_embedding":
        parts = layer_answers(asked, case.function, arguments)
        return joined([{name: to_numpy(one) for name, one in part.items()} for part in parts])
    operands, keywords = arranged(case.function, arguments)
    return {"output": to_numpy(asked(*operands, **keywords))}


def wrong(case: Case, dtype: str, outputs: Mapping[str, Any]) -> str | None:
    """What is wrong with the outputs of a case, if anything is."""
    allowed = allowances(case.function, case.inputs(dtype), case.options, precision(dtype))
    judgement = judge(case, case.expected, outputs, allowed, precision(dtype))
    return None if judgement.passed else f"{case.id} {dtype}: {judgement.reason}"


def failures(some: Iterable[Case], ask: Callable[[Case, str], Mapping[str, Any]], *dtypes: str) -> list[str]:
    asked = [(case, dtype) for case in some for dtype in dtypes if dtype in case.dtypes]
    assert asked
    return [found for case, dtype in asked if (found := wrong(case, dtype, ask(case, dtype)))]


def test_every_golden() -> None:
    assert not failures(cases(), lambda case, dtype: answered(case, arguments_of(case, dtype)), "float32")


def test_goldens_in_other_dtypes() -> None:
    def ask(case: Case, dtype: str) -> dict[str, Any]:
        return answered(case, arguments_of(case, dtype))

    assert not failures(chosen(), ask, "float64", "float16", "bfloat16")


def test_goldens_with_numbers_on_the_host() -> None:
    some = [case for case in cases() if set(HOST) & set(case.input_names)]
    assert not failures(some, lambda case, dtype: answered(case, arguments_of(case, dtype, HOST)), "float32")


@pytest.mark.parametrize("compiled", [False, True], ids=["graph", "xla"])
def test_goldens_in_a_function(compiled: bool) -> None:
    def ask(case: Case, dtype: str) -> dict[str, Any]:
        return answered(case, arguments_of(case, dtype), traced(jit_compile=compiled))

    some = chosen(*(("rotary", "bias", "dropout_mask", "cache_key", "kv_segment_ids") if compiled else ()))
    assert not failures([case for case in some if "drafts" not in case.options], ask, "float32")


# The reference.


def sized(dtype: str = "float64", **options: Any) -> Any:
    """A layer in which every size is another, with numbers in every parameter."""
    given: dict[str, Any] = {"kv_heads": KV_HEADS, "qk_dim": QK_DIM, "v_dim": V_DIM, "out": OUT}
    layer = MultiHeadAttention(EMBED, HEADS, dtype=dtype, **given | options)
    layer.set_weights(
        [numbers(*one.shape, seed=one.numpy().size) / 2 for one in layer.trainable_weights]
        + [one.numpy() for one in layer.non_trainable_weights]
    )
    return layer


def numbers(*shape: int, seed: int = 5) -> numpy.ndarray:
    return numpy.random.default_rng([seed, *shape]).standard_normal(shape)


def pattern(*shape: int) -> numpy.ndarray:
    """Some True, in each row the first."""
    seen = numpy.random.default_rng(2).random(shape) < 0.6
    seen[..., 0] = True
    return seen


def tokens(length: int = LENGTH, size: int = EMBED, seed: int = 5) -> tf.Tensor:
    return tf.constant(numbers(BATCH, length, size, seed=seed))


def floats(tree: Any, dtype: str) -> Any:
    def one(leaf: Any) -> Any:
        return tf.cast(leaf, dtype) if tf.is_tensor(leaf) and leaf.dtype.is_floating else leaf

    return tf.nest.map_structure(one, tree)


def with_gradients(call: Callable[[], Any], given: Any) -> list[tf.Tensor]:
    """What a function gives, and the gradients of a sum in which every element counts differently."""
    with tf.GradientTape() as tape:
        tape.watch(given)
        outputs = tf.nest.flatten(call())
        total = tf.add_n([tf.reduce_sum(one * uneven(one)) for one in outputs])
    return [*outputs, *map(tf.convert_to_tensor, tape.gradient(total, tf.nest.flatten(given)))]


def uneven(one: tf.Tensor) -> tf.Tensor:
    steps = tf.cast(tf.linspace(-1.0, 2.0, tf.size(one)), one.dtype)
    return tf.reshape(steps, tf.shape(one))


def assert_same(ours: Callable[[str], Any], theirs: Any) -> None:
    """In float64 ours is nearer to theirs than to ours in float32, which is off by roundings alone."""
    found, rounded, expected = (tf.nest.flatten(one) for one in (ours("float64"), ours("float32"), theirs))
    for one, lost, other in zip(found, rounded, expected, strict=True):
        assert (one.dtype, one.shape, lost.dtype) == (tf.float64, other.shape, tf.float32)
        error, loss = (abs(to_numpy(one) - to_numpy(x)).max(initial=0.0) for x in (other, lost))
        assert error < loss or error == loss == 0


def assert_near(found: Any, expected: Any) -> None:
    """Results in float64 are nearer to each other than float32 could tell."""
    one, other = to_numpy(found), to_numpy(expected)
    assert (one.dtype, one.shape) == (other.dtype, other.shape) == (numpy.float64, one.shape)
    assert abs(one - other).max() < numpy.finfo(numpy.float32).eps * abs(other).max()


def torched(one: Any) -> torch.Tensor:
    return torch.from_numpy(numpy.array(one))


Options = dict[str, Any]
CROSS = {"k_embed": 3, "v_embed": 17}
OPTIONS: dict[str, tuple[Options, Callable[[], Options]]] = {
    "plain": ({"bias": False}, dict),
    "norms": ({"qk_norm": True, "norm_epsilon": 0.25}, lambda: {"causal": True, "q_offset": -1}),
    "halves": ({"rotary": {}}, lambda: {"q_offset": [2, 5]}),
    "interleaved": ({"rotary": {"interleaved": True, "base": 7.0}}, lambda: {"q_offset": numpy.asarray([1, 3])}),
    "partial": ({"rotary": {"rotary_dim": 2}, "qk_norm": True}, lambda: {"window": (4, 1), "q_offset": 3}),
    "cross": (CROSS, lambda: {"kv_lengths": [5, 8], "q_lengths": numpy.asarray([3, 2])}),
    "mask": ({}, lambda: {"mask": pattern(BATCH, 1, 3, 8), "scale": -0.7, "softcap": 1.9, "sinks": numbers(HEADS)}),
    "dropout": (
        {},
        lambda: {
            "bias": numbers(1, HEADS, 1, 8),
            "dropout_rate": 0.3,
            "dropout_mask": pattern(1, HEADS, 3, 8),
            "q_segment_ids": numpy.asarray([[0, 1, 1]] * 2),
            "kv_segment_ids": numpy.arange(16).reshape(2, 8) // 4,
        },
    ),
}


def by_reference(layer: Any, inputs: list[tf.Tensor], options: Options) -> list[numpy.ndarray]:
    """Output and weights of the reference, and the gradients that PyTorch takes of it."""
    fixed = {"rotary": layer.rotary, "norm_epsilon": layer.norm_epsilon}
    given = {name: torched(one) if isinstance(one, numpy.ndarray) else one for name, one in options.items()}
    params = {name: torched(one).requires_grad_() for name, one in layer.params.items()}
    x = [torched(one).requires_grad_() for one in inputs]
    of_weights = {name: one for name, one in given.items() if "dropout" not in name}
    weights = reference.multi_head_attention_weights(*x[:2], params, **fixed, **of_weights)
    outputs = [reference.multi_head_attention(*x, params, **fixed, **given), weights]
    total: Any = sum((one * torched(uneven(tf.constant(one.detach().numpy())))).sum() for one in outputs)
    gradients = torch.autograd.grad(total, [*params.values(), *x])
    return [one.detach().numpy() for one in (*outputs, *gradients)]


def unknown(name: str, array: tf.Tensor, batch: int | None) -> tf.TensorSpec:
    """The array with no size that is one of batch or length; 1 broadcasts."""
    first, *rest = array.shape
    sizes = [1 if first == 1 else batch, *(size if size in {1, HEADS} else None for size in rest)]
    return tf.TensorSpec(array.shape if name == "sinks" else sizes, array.dtype)


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, mode) for name in OPTIONS for mode in ("eager", "graph")), ("partial", "xla")]
)
def test_outputs_gradients_and_weights_are_those_of_the_reference(name: str, mode: str) -> None:
    sizes, made = OPTIONS[name]
    layer, given = sized(**sizes), made()
    inputs = [tokens(3), tokens(8, sizes.get("k_embed", EMBED)), tokens(8, sizes.get("v_embed", EMBED), seed=6)]
    arrays = {name: tf.constant(one) for name, one in given.items() if isinstance(one, numpy.ndarray)}
    fixed = {name: one for name, one in given.items() if name not in arrays}

    def ours(dtype: str) -> list[tf.Tensor]:
        own = sized(dtype, **sizes)

        def asked(x: list[tf.Tensor], arrays: dict[str, tf.Tensor]) -> list[tf.Tensor]:
            variables = [getattr(own, name).value for name in own.sizes.shapes()]

            def call() -> tuple[tf.Tensor, tf.Tensor]:
                of_weights = {name: one for name, one in (arrays | fixed).items() if "dropout" not in name}
                return own(*x, **arrays, **fixed), own.attention_weights(*x[:2], **of_weights)

            return with_gradients(call, [*variables, *x])

        if mode == "eager":
            return asked(*floats((inputs, arrays), dtype))
        batch = BATCH if any(isinstance(one, list) for one in fixed.values()) else None
        specs = [tf.TensorSpec((batch, None, one.shape[2]), dtype) for one in inputs]
        like = {name: unknown(name, one, batch) for name, one in floats(arrays, dtype).items()}
        signature = (specs, like) if mode == "graph" else None
        function = tf.function(asked, input_signature=signature, jit_compile=mode == "xla")
        return function(*floats((inputs, arrays), dtype))

    assert_same(ours, by_reference(layer, inputs, given))


def test_linear_biases_are_those_of_the_reference() -> None:
    for heads in (1, 5, 8, 12):
        slopes = mha_spec_tensorflow.alibi_slopes(heads, dtype="float64")
        assert (slopes.dtype, tf.is_tensor(slopes)) == (tf.float64, True)
        assert numpy.array_equal(slopes, reference.alibi_slopes(heads, dtype="float64"))
        for offset in (2, [1, -4], tf.constant([1, -4])):
            host = offset if isinstance(offset, (int, list)) else offset.numpy()
            expected = reference.alibi_bias(slopes.numpy(), 3, 7, q_offset=host)
            assert numpy.array_equal(mha_spec_tensorflow.alibi_bias(slopes, 3, 7, q_offset=offset), expected)
            asked = tf.function(
                lambda slopes, offset=offset: mha_spec_tensorflow.alibi_bias(slopes, 3, 7, q_offset=offset)
            )
            assert numpy.array_equal(asked(slopes), expected)


# The layer of Keras.


def test_the_object_is_the_function_with_its_parameters() -> None:
    layer = sized(qk_norm=True, rotary={"base": 5.0}, norm_epsilon=0.5)
    x, key = tokens(), tokens(5, seed=7)
    options = {"rotary": {"base": 5.0}, "norm_epsilon": 0.5, "q_offset": 3, "causal": True}
    called, weighed = layer(x, key, causal=True, q_offset=3), layer.attention_weights(x, key, causal=True, q_offset=3)
    assert numpy.array_equal(called, mha_spec.multi_head_attention(x, key, key, layer.params, **options))
    assert numpy.array_equal(weighed, mha_spec.multi_head_attention_weights(x, key, layer.params, **options))
    assert numpy.array_equal(layer(x), layer(x, x, x))
    assert {name: tuple(one.shape) for name, one in layer.params.items()} == layer.sizes.shapes()
    assert [one.name for one in layer.weights] == list(AXES)


def test_weights_begin_as_in_the_paper() -> None:
    params = MultiHeadAttention(64, 4, qk_dim=24, out=96, qk_norm=True).params
    for name, fans in {"w_q": (64, 96), "w_k": (64, 96), "w_v": (64, 96), "w_o": (96, 96)}.items():
        drawn, bound = params[name].numpy(), (6 / sum(fans)) ** 0.5
        assert drawn.dtype == numpy.float32
        assert bound * 0.99 < abs(drawn).max() <= bound
        assert abs(drawn.mean()) < 4 * bound / (3 * drawn.size) ** 0.5
    assert all((params[name].numpy() == 0).all() for name in ("b_q", "b_k", "b_v", "b_o"))
    assert all((params[name].numpy() == 1).all() for name in ("q_norm", "k_norm"))
    assert not numpy.array_equal(params["w_q"], params["w_k"])


def test_a_layer_says_what_it_is() -> None:
    layer = MultiHeadAttention(24, 4, kv_heads=2, rotary={"base": 5.0}, dropout_rate=0.1)
    assert repr(layer) == "MultiHeadAttention(embed=24, heads=4, kv_heads=2, rotary={'base': 5.0}, dropout_rate=0.1)"


def test_a_layer_is_made_again_of_its_config() -> None:
    layer = sized(k_embed=3, rotary={"base": 5.0}, norm_epsilon=0.5, dropout_rate=0.25, qk_norm=True, name="mine")
    again = MultiHeadAttention.from_config(layer.get_config())
    assert (repr(again), again.name, again.dtype_policy.name) == (repr(layer), "mine", "float64")
    assert again.get_config() == layer.get_config()
    told = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert isinstance(told, MultiHeadAttention)
    assert told.get_config() == layer.get_config()


def model_of(layer: Any) -> Any:
    x, memory = keras.Input((None, EMBED), dtype="float64"), keras.Input((None, EMBED), dtype="float64")
    return keras.Model([x, memory], layer(x, memory, causal=True, q_offset=0))


def test_a_model_of_unknown_lengths() -> None:
    layer = sized(rotary={})
    model = model_of(layer)
    assert model.output_shape == (None, None, OUT)
    for length in (3, LENGTH):
        x, memory = tokens(length), tokens(5, seed=6)
        assert_near(model([x, memory]), layer(x, memory, causal=True, q_offset=0))
    assert_near(model.predict([tokens(3), tokens(5)], verbose=0), layer(tokens(3), tokens(5), causal=True, q_offset=0))


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
def test_a_model_is_saved_and_loaded(tmp_path: Path, ending: str) -> None:
    loaded: Any = None
    path, x = tmp_path / f"model{ending}", [tokens(3), tokens(5, seed=6)]
    model = model_of(sized(rotary={"interleaved": True}, qk_norm=True, dropout_rate=0.1))
    if ending == ".keras":
        model.save(path)
        loaded = keras.models.load_model(path)
    else:
        model.save_weights(path)
        loaded = model_of(
            MultiHeadAttention(
                EMBED,
                HEADS,
                kv_heads=KV_HEADS,
                qk_dim=QK_DIM,
                v_dim=V_DIM,
                out=OUT,
                qk_norm=True,
                rotary={"interleaved": True},
                dropout_rate=0.1,
                dtype="float64",
            )
        )
        assert not numpy.array_equal(loaded(x), model(x))
        loaded.load_weights(path)
    assert numpy.array_equal(loaded(x), model(x))


def test_a_step_of_training() -> None:
    model = model_of(sized(dropout_rate=0.1))
    model.compile(optimizer=keras.optimizers.SGD(0.01), loss="mse", jit_compile=False)
    x, goal = [tokens(3), tokens(5, seed=6)], numbers(BATCH, 3, OUT)
    before = {one.name: one.numpy() for one in model.trainable_weights}
    first = model.evaluate(x, goal, verbose=0)
    model.fit(x, goal, epochs=3, verbose=0)
    assert model.evaluate(x, goal, verbose=0) < first
    assert all((one.numpy() != before[one.name]).any() for one in model.trainable_weights if one.name != "b_k")


def test_dropout_is_for_training() -> None:
    layer, x = sized(dropout_rate=0.5), tokens()
    assert numpy.array_equal(layer(x), layer(x, training=False))
    call = tf.function(lambda x: layer(x, training=True))
    for asked in (call, lambda x: layer(x, training=True)):
        drawn = [asked(x).numpy() for _ in range(3)]
        assert not any(numpy.array_equal(one, other) for one, other in zip(drawn, drawn[1:] + drawn[:1], strict=True))
    with_key = [layer(x, training=True, dropout_key=key).numpy() for key in (1, 1, 2)]
    assert numpy.array_equal(*with_key[:2])
    assert not numpy.array_equal(*with_key[1:])
    assert numpy.array_equal(layer(x), layer(x, training=True, dropout_rate=0.0))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_computes_in_its_type(policy: str) -> None:
    layer, x = sized(policy, rotary={}), tokens()
    half = policy.removeprefix("mixed_")
    with tf.GradientTape() as tape:
        output = layer(x)
        total = tf.reduce_sum(tf.cast(output, tf.float32))
    step, cache = layer(x, cache=layer.empty_cache(BATCH, LENGTH))
    assert {one.dtype.name for one in (output, step, cache.key, cache.value)} == {half}
    gradients = tape.gradient(total, [one.value for one in layer.trainable_weights])
    assert {one.dtype.name for one in gradients} == {"float32"}
    params = {name: tf.cast(getattr(layer, name).value, half) for name in layer.sizes.shapes()}
    x = tf.cast(x, half)
    assert numpy.array_equal(output, multi_head_attention(x, x, x, params, rotary={}))


def test_masks_of_keras_are_not_taken_in_silence() -> None:
    embedding, layer = keras.layers.Embedding(5, EMBED, mask_zero=True), MultiHeadAttention(EMBED, 1)
    x = embedding(numpy.asarray([[1, 2, 0]]))
    with pytest.warns(UserWarning, match="does not support masking"):
        layer(x)


# Caches.

STEPS = {"token by token": [1] * LENGTH, "chunks": [3, 5, 1, 2], "at once": [LENGTH]}


@pytest.mark.parametrize("mode", ["host", "tensor", "graph"])
@pytest.mark.parametrize("steps", STEPS)
def test_decoding_in_any_steps_is_one_call(steps: str, mode: str) -> None:
    layer, x = sized(qk_norm=True, rotary={}), tokens()

    def ours(dtype: str) -> list[tf.Tensor]:
        own = sized(dtype, qk_norm=True, rotary={})

        def call(part: tf.Tensor, cache: KVCache) -> tuple[tf.Tensor, tf.Tensor, KVCache]:
            seen = own.attention_weights(part, causal=True, cache=cache)[..., :LENGTH]
            output, new = own(part, causal=True, cache=cache)
            return output, seen, new

        step = tf.function(call) if mode == "graph" else call
        cache, outputs, weights = own.empty_cache(BATCH, LENGTH + 2), [], []
        cache = cache if mode == "host" else cache._replace(lengths=tf.constant(cache.lengths))
        for part in tf.split(tf.cast(x, dtype), STEPS[steps], axis=1):
            output, seen, cache = step(part, cache)
            outputs.append(output)
            weights.append(seen)
        assert tf.is_tensor(cache.lengths) == (mode != "host")
        assert numpy.array_equal(cache.lengths, [LENGTH] * BATCH)
        return [tf.concat(outputs, 1), tf.concat(weights, 2)]

    assert_same(ours, [layer(x, causal=True), layer.attention_weights(x, causal=True)])


def counted(function: Any) -> int:
    """How many graphs were made of a function."""
    return function.experimental_get_tracing_count()


@pytest.mark.parametrize("compiled", [False, True], ids=["graph", "xla"])
def test_one_graph_serves_every_step(compiled: bool) -> None:
    layer, x = sized(rotary={}), tokens()

    @tf.function(jit_compile=compiled)
    def step(token: tf.Tensor, cache: KVCache) -> tuple[tf.Tensor, KVCache]:
        return layer(token, causal=True, cache=cache)

    cache, outputs = layer.empty_cache(BATCH, LENGTH), []
    cache = cache._replace(lengths=tf.constant(cache.lengths))
    for token in tf.split(x, LENGTH, axis=1):
        output, cache = step(token, cache)
        outputs.append(output)
    assert counted(step) == 1
    assert_near(tf.concat(outputs, 1), layer(x, causal=True))


def test_one_graph_serves_chunks_of_every_length() -> None:
    layer, x = sized(rotary={}), tokens()

    @tf.function(input_signature=[tf.TensorSpec((BATCH, None, EMBED), tf.float64)])
    def whole(x: tf.Tensor) -> tf.Tensor:
        cache = layer.empty_cache(BATCH, LENGTH)
        first, cache = layer(x[:, :4], causal=True, cache=cache)
        second, cache = layer(x[:, 4:], causal=True, cache=cache)
        return tf.concat([first, second], 1)

    for length in (7, LENGTH):
        assert_near(whole(x[:, :length]), layer(x[:, :length], causal=True))
    assert counted(whole) == 1


def test_gradients_go_through_a_cache() -> None:
    layer, x = sized(rotary={}), tokens()

    def decoded(layer: Any, x: tf.Tensor) -> tf.Tensor:
        cache, outputs = layer.empty_cache(BATCH, LENGTH), []
        for part in tf.split(x, [4, 4, 3], axis=1):
            output, cache = layer(part, causal=True, cache=cache)
            outputs.append(output)
        return tf.concat(outputs, 1)

    def ours(dtype: str) -> list[tf.Tensor]:
        own, given = sized(dtype, rotary={}), tf.cast(x, dtype)
        return with_gradients(lambda: decoded(own, given), [given, *(one.value for one in own.trainable_weights)])

    leaves = [x, *(one.value for one in layer.trainable_weights)]
    assert_same(ours, with_gradients(lambda: layer(x, causal=True), leaves))


@pytest.mark.parametrize("host", [True, False], ids=["host", "tensor"])
def test_entries_of_other_lengths_decode_each_for_itself(host: bool) -> None:
    layer, given = sized(rotary={}), [3, 5]
    clean = tokens(7).numpy()
    garbage = clean.copy()
    garbage[0, 3:5] = numpy.nan

    def ours(dtype: str) -> list[tf.Tensor]:
        own, x = sized(dtype, rotary={}), tf.constant(garbage, dtype)
        cache = own.empty_cache(BATCH, LENGTH)
        cache = cache if host else cache._replace(lengths=tf.constant(cache.lengths))
        lengths = given if host else tf.constant(given)
        _, cache = own(x[:, :5], causal=True, cache=cache, kv_lengths=lengths)
        output, after = own(x[:, 5:], causal=True, cache=cache)
        assert numpy.array_equal(after.lengths, [5, 7])
        return [output]

    entries = enumerate(given)
    alone = [numpy.concatenate([clean[b : b + 1, :length], clean[b : b + 1, 5:]], 1) for b, length in entries]
    expected = [layer(tf.constant(x), causal=True)[:, x.shape[1] - 2 :] for x in alone]
    assert_same(ours, [tf.concat(expected, 0)])


def heads(length: int, seed: int = 5) -> tuple[tf.Tensor, tf.Tensor]:
    shape = (BATCH, KV_HEADS, length)
    return tf.constant(numbers(*shape, QK_DIM, seed=seed)), tf.constant(numbers(*shape, V_DIM, seed=seed))


def test_an_old_cache_reads_as_before() -> None:
    caches = [empty_cache(BATCH, KV_HEADS, LENGTH, QK_DIM, V_DIM, like=tf.zeros((), tf.float64))]
    for seed in range(3):
        caches.append(append_cache(caches[-1], *heads(2, seed), [1, 2]))
    seen = [cache.key.numpy().copy() for cache in caches]
    branch = append_cache(caches[1], *heads(3, seed=9))
    held = KVCache(*(numpy.asarray(one) for one in caches[1]))
    expected = reference.append_cache(held, *(one.numpy() for one in heads(3, seed=9)))
    assert all(numpy.array_equal(cache.key, before) for cache, before in zip(caches, seen, strict=True))
    assert all(numpy.array_equal(*pair) for pair in zip(branch, expected, strict=True))


def test_a_full_cache_is_an_error_on_the_host() -> None:
    layer = sized()
    _, cache = layer(tokens(8), cache=layer.empty_cache(BATCH, LENGTH))
    assert isinstance(cache.lengths, numpy.ndarray)
    before = cache.key.numpy().copy()
    with pytest.raises(ArgumentValueError, match=f"capacity={LENGTH}"):
        layer(tokens(4), cache=cache)
    assert numpy.array_equal(cache.key, before)
    assert layer(tokens(3), cache=cache)[1].lengths.tolist() == [LENGTH] * 2


def test_tokens_beyond_a_full_cache_are_dropped_and_counted() -> None:
    layer = sized(rotary={})
    _, cache = layer(tokens(9), cache=layer.empty_cache(BATCH, LENGTH), kv_lengths=[9, 4])
    cache = cache._replace(lengths=tf.constant(cache.lengths))
    after = tf.function(lambda cache: layer(tokens(4, seed=6), causal=True, cache=cache)[1])(cache)
    assert numpy.array_equal(after.lengths, [13, 8])
    for before, now in zip(cache[:2], after[:2], strict=True):
        assert numpy.array_equal(now[0, :, :9], before[0, :, :9])
        assert numpy.array_equal(now[1, :, :4], before[1, :, :4])
        assert (now[0, :, 9:].numpy() != before[0, :, 9:].numpy()).all()
        assert numpy.array_equal(now[1, :, 8:], before[1, :, 8:])
    full = layer(tokens(2, seed=7), causal=True, cache=after)[1]
    assert numpy.array_equal(full.key[0], after.key[0])
    assert numpy.array_equal(full.lengths, [15, 10])


@pytest.mark.parametrize("start", [[3, 0], [3, 3], [9, 10], [11, 20], [-1, -2]])
def test_tokens_are_stored_where_they_belong(start: list[int]) -> None:
    new, expected = heads(3)[0], numpy.zeros((BATCH, KV_HEADS, LENGTH, QK_DIM))
    buffer = tf.constant(expected.copy())
    for b, i in numpy.ndindex(BATCH, 3):
        if 0 <= start[b] + i < LENGTH:
            expected[b, :, start[b] + i] = new[b, :, i]
    begin = numpy.asarray(start)
    assert numpy.array_equal(store(buffer, new, begin, begin + 3), expected)
    in_graph = traced()(store)
    assert numpy.array_equal(in_graph(buffer, new, tf.constant(start), tf.constant(start) + 3), expected)


def test_keys_cached_before_serve_cross_attention() -> None:
    layer, x, key, value = sized(**CROSS), tokens(), tokens(8, 3), tokens(8, 17)
    _, cache = layer(x[:, :1], key, value, cache=layer.empty_cache(BATCH, 8), q_offset=0)
    found, after = multi_head_attention(x, None, None, layer.params, cache=cache, q_offset=0)
    assert_near(found, layer(x, key, value))
    assert numpy.array_equal(after.lengths, cache.lengths)
