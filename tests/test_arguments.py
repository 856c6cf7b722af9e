"""Arguments of attention, its gradients and merging: the errors, and the values that are accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.calls import BATCH, HEADS, KV_LEN, Q_LEN, QK_DIM, V_DIM, arguments, operand

from mha_spec import ArgumentTypeError, ArgumentValueError

if TYPE_CHECKING:
    from types import ModuleType

ones = numpy.ones


def test_weights_take_no_dropout(attention_module: ModuleType) -> None:
    operands = {name: value for name, value in arguments().items() if name != "value"}
    with pytest.raises(ArgumentTypeError, match="`dropout_rate`"):
        attention_module.attention_weights(**operands, dropout_rate=0.1)


def test_gradients_draw_no_dropout(attention_module: ModuleType) -> None:
    with pytest.raises(ArgumentValueError, match=r"`dropout_mask` must be given with dropout_rate=0\.1"):
        attention_module.attention_vjp(operand(BATCH, HEADS, Q_LEN, V_DIM), **arguments(dropout_rate=0.1))


@pytest.mark.parametrize(
    ("cotangents", "argument"),
    [
        ({"grad_output": operand(BATCH, HEADS, Q_LEN, QK_DIM)}, "grad_output"),
        ({"grad_output": operand(BATCH, HEADS, Q_LEN, V_DIM), "grad_lse": operand(BATCH, HEADS, KV_LEN)}, "grad_lse"),
        ({"grad_output": operand(BATCH, HEADS, Q_LEN, V_DIM), "grad_lse": operand(BATCH, HEADS, Q_LEN, 1)}, "grad_lse"),
    ],
)
def test_cotangents_have_the_shapes_of_results(
    attention_module: ModuleType, cotangents: dict[str, Any], argument: str
) -> None:
    with pytest.raises(ArgumentValueError, match=rf"`{argument}` must have shape=\(2, 6, 5.*received shape="):
        attention_module.attention_vjp(**cotangents, **arguments())


@pytest.mark.parametrize(
    ("changed", "error", "argument"),
    [
        ({"lse_b": operand(BATCH, HEADS, Q_LEN, 1)}, ArgumentValueError, "lse_b"),
        ({"output_b": operand(BATCH, HEADS, Q_LEN, QK_DIM)}, ArgumentValueError, "output_b"),
        ({"lse_a": [0.0]}, ArgumentTypeError, "lse_a"),
    ],
)
def test_halves_fit(
    attention_module: ModuleType, changed: dict[str, Any], error: type[Exception], argument: str
) -> None:
    halves = {name: operand(BATCH, HEADS, Q_LEN, V_DIM) for name in ("output_a", "output_b")}
    halves |= {name: operand(BATCH, HEADS, Q_LEN) for name in ("lse_a", "lse_b")}
    with pytest.raises(error, match=f"`{argument}` must"):
        attention_module.merge_attention(**(halves | changed))


@pytest.mark.parametrize(
    ("keyword", "hint"),
    [("lse", "Did you mean `lse_b`?"), ("dropout_rate", "The arguments are output_a, lse_a, output_b, lse_b.")],
)
def test_merging_takes_no_option(attention_module: ModuleType, keyword: str, hint: str) -> None:
    halves = operand(BATCH, HEADS, Q_LEN, V_DIM), operand(BATCH, HEADS, Q_LEN)
    with pytest.raises(ArgumentTypeError) as raised:
        attention_module.merge_attention(*halves, *halves, **{keyword: None})
    assert str(raised.value) == f"`{keyword}` is not an option of merge_attention. {hint} [MHA-ARG-1]"


@pytest.mark.parametrize("argument", ["query", "key", "value", "mask", "bias", "sinks", "kv_lengths"])
def test_masked_arrays_of_numpy_are_refused(attention_module: ModuleType, argument: str) -> None:
    """Without the error, the elements that their mask hides would be visible."""
    further = {
        "mask": ones((1, 1, 1, KV_LEN), bool),
        "bias": ones((1, 1, 1, KV_LEN)),
        "sinks": ones(HEADS),
        "kv_lengths": ones(BATCH, int),
    }
    masked = numpy.ma.masked_array((arguments() | further)[argument])
    with pytest.raises(ArgumentTypeError, match=f"`{argument}` must "):
        attention_module.attention(**arguments(**{argument: masked}))


@pytest.mark.parametrize("library", ["torch", "jax", "array_api_strict"])
@pytest.mark.parametrize("argument", ["key", "value", "mask", "bias", "sinks", "dropout_mask"])
def test_libraries_are_not_mixed(attention_module: ModuleType, library: str, argument: str) -> None:
    xp = pytest.importorskip({"jax": "jax.numpy"}.get(library, library))
    shapes = {
        "mask": (1, 1, Q_LEN, KV_LEN),
        "dropout_mask": (1, 1, Q_LEN, KV_LEN),
        "bias": (1, 1, Q_LEN, KV_LEN),
        "sinks": (HEADS,),
    }
    plain = (
        arguments()[argument]
        if argument not in shapes
        else ones(shapes[argument], bool if "mask" in argument else "float32")
    )
    with pytest.raises(
        ArgumentTypeError,
        match=rf"`{argument}` must be an array of numpy, as `query` is, received an array of {library}",
    ):
        attention_module.attention(**arguments(**{argument: xp.asarray(plain)}))


def test_devices_are_not_mixed() -> None:
    torch = pytest.importorskip("torch")
    from mha_spec import reference

    tensors = {name: torch.asarray(array) for name, array in arguments().items()}
    with pytest.raises(
        ArgumentValueError, match="`key` must be on the device of `query`, device=cpu, received device=meta"
    ):
        reference.attention(**tensors | {"key": tensors["key"].to("meta")})
    with pytest.raises(
        ArgumentValueError, match="`mask` must be on the device of `query`, device=cpu, received device=meta"
    ):
        reference.attention(**tensors, mask=torch.ones((1, 1, 1, KV_LEN), dtype=torch.bool, device="meta"))


@pytest.mark.parametrize("library", ["torch", "jax", "array_api_strict"])
def test_lengths_that_cannot_be_read_are_clamped(library: str) -> None:
    xp = pytest.importorskip({"jax": "jax.numpy"}.get(library, library))
    from mha_spec import reference

    tensors = {name: xp.asarray(array) for name, array in arguments().items()}
    for argument, size in (("q_lengths", Q_LEN), ("kv_lengths", KV_LEN)):
        beyond = reference.attention(**tensors, **{argument: xp.asarray(numpy.asarray([size + 9, -4], "int32"))})
        clamped = reference.attention(**tensors, **{argument: xp.asarray(numpy.asarray([size, 0], "int32"))})
        assert numpy.array_equal(numpy.asarray(beyond), numpy.asarray(clamped))
        assert not numpy.asarray(clamped)[1].any()


@pytest.mark.parametrize("scalar", [{"scale": numpy.float64(0.3)}, {"softcap": numpy.float64(2)}], ids=str)
def test_scalars_of_numpy_do_not_widen_the_result(attention_module: ModuleType, scalar: dict[str, float]) -> None:
    results = attention_module.attention(**arguments(), **scalar, return_lse=True)
    plain = {name: float(value) for name, value in scalar.items()}
    for result, expected in zip(
        results, attention_module.attention(**arguments(), **plain, return_lse=True), strict=True
    ):
        assert result.dtype == numpy.float32
        assert numpy.array_equal(result, expected)


def test_integers_of_numpy_are_integers(attention_module: ModuleType) -> None:
    plain = {"q_offset": 2, "window": (1, 2), "kv_lengths": [5, 6]}
    of_numpy = {
        "q_offset": numpy.int64(2),
        "window": (numpy.uint8(1), numpy.int32(2)),
        "kv_lengths": [numpy.int64(5), numpy.int8(6)],
    }
    expected = attention_module.attention(**arguments(), **plain)
    assert numpy.array_equal(attention_module.attention(**arguments(), **of_numpy), expected)


@pytest.mark.parametrize("number", [{"scale": 10**400}, {"softcap": 1e300}, {"scale": -1e39}], ids=str)
def test_numbers_beyond_the_softmax_are_refused(attention_module: ModuleType, number: dict[str, float]) -> None:
    with pytest.raises(ArgumentValueError, match=f"`{next(iter(number))}` must be finite"):
        attention_module.attention(**arguments(), **number)


@pytest.mark.parametrize("library", ["torch", "jax", "array_api_strict"])
def test_wide_segment_ids_are_distinguished(library: str) -> None:
    xp = pytest.importorskip({"jax": "jax.numpy"}.get(library, library))
    import mha_spec_numpy
    from mha_spec import reference

    near, far = arguments(), arguments()
    far["value"][:, :, 3:] += 1
    ids = {"q_segment_ids": numpy.ones((BATCH, Q_LEN), "int64"), "kv_segment_ids": numpy.ones((BATCH, KV_LEN), "int64")}
    ids["kv_segment_ids"][:, 3:] += 2**32
    for module in (reference, mha_spec_numpy):
        for dtype in ("int64", "uint64"):
            options = {name: array.astype(dtype) for name, array in ids.items()}
            first, second = (
                numpy.asarray(module.attention(**{name: xp.asarray(array) for name, array in call.items()}, **options))
                for call in (near, far)
            )
            assert first.any()
            assert numpy.array_equal(first, second)


@pytest.mark.parametrize(
    ("function", "option", "words"),
    [
        ("attention", "retrun_lse", "Did you mean `return_lse`"),
        ("attention_vjp", "return_lse", "not an option of attention_vjp"),
        ("attention_weights", "value", "not an option of attention_weights"),
        ("attention_weights", "dropout_rate", "before dropout"),
    ],
)
def test_keywords_of_other_functions(attention_module: ModuleType, function: str, option: str, words: str) -> None:
    query, key, value = arguments().values()
    operands = {
        "attention": (query, key, value),
        "attention_weights": (query, key),
        "attention_vjp": (operand(BATCH, HEADS, Q_LEN, V_DIM), query, key, value),
    }
    with pytest.raises(ArgumentTypeError, match=f"`{option}` is not an option of {function}.*") as caught:
        getattr(attention_module, function)(*operands[function], **{option: 1})
    assert words in str(caught.value)


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex64"])
def test_cotangents_and_halves_are_floating(attention_module: ModuleType, dtype: str) -> None:
    output, lse = operand(BATCH, HEADS, Q_LEN, V_DIM), operand(BATCH, HEADS, Q_LEN)
    with pytest.raises(ArgumentTypeError, match="`grad_output` must have a dtype"):
        attention_module.attention_vjp(output.astype(dtype), **arguments())
    with pytest.raises(ArgumentTypeError, match="`lse_b` must have a dtype"):
        attention_module.merge_attention(output, lse, output, lse.astype(dtype))
    with pytest.raises(ArgumentTypeError, match="`lse_b` must have the dtype of the other half"):
        attention_module.merge_attention(output, lse, output, lse.astype("float64"))


def test_merging_with_an_empty_half_changes_nothing(attention_module: ModuleType) -> None:
    output, lse = operand(BATCH, HEADS, Q_LEN, V_DIM, dtype="float64"), operand(BATCH, HEADS, Q_LEN)
    lse[0, 0, 0] = numpy.inf
    empty, garbage = numpy.full_like(lse, -numpy.inf), numpy.full_like(output, numpy.nan)
    for merged in (
        attention_module.merge_attention(output, lse, garbage, empty),
        attention_module.merge_attention(garbage, empty, output, lse),
    ):
        assert [part.dtype for part in merged] == [numpy.float64, numpy.float32]
        assert numpy.array_equal(merged[0], output)
        assert numpy.array_equal(merged[1], lse)


def test_every_valid_argument_is_accepted(attention_module: ModuleType) -> None:
    rows = numpy.asarray([[0, 0, 1, 1, 2]] * BATCH)
    output, lse = attention_module.attention(
        **arguments(),
        mask=ones((1, HEADS, 1, KV_LEN), bool),
        bias=ones((BATCH, 1, Q_LEN, 1)),
        causal=True,
        q_offset=(2, -3),
        window=[4, None],
        q_lengths=[4, 5],
        kv_lengths=numpy.asarray([7, 6], "uint8"),
        q_segment_ids=rows,
        kv_segment_ids=numpy.asarray([[0, 0, 0, 1, 1, 1, 2]] * BATCH),
        scale=-1,
        softcap=3,
        sinks=ones(HEADS, "float64"),
        dropout_rate=0,
        dropout_mask=ones((1, 1, Q_LEN, KV_LEN), bool),
        return_lse=True,
    )
    assert output.shape == (BATCH, HEADS, Q_LEN, V_DIM)
    assert lse.shape == (BATCH, HEADS, Q_LEN)
    assert output.dtype == lse.dtype == "float32"
