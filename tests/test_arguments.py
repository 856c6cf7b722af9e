from __future__ import annotations

import importlib
import math
import re
from typing import TYPE_CHECKING, Any

import numpy
import pytest

from mha_spec import ArgumentTypeError, ArgumentValueError, MhaSpecError

if TYPE_CHECKING:
    from types import ModuleType

BATCH, HEADS, KV_HEADS, Q_LEN, KV_LEN, QK_DIM, V_DIM = 2, 6, 3, 5, 7, 11, 13


def random(*shape: int, dtype: str = "float32") -> numpy.ndarray:
    return numpy.random.default_rng(17).standard_normal(shape).astype(dtype)


def arguments(**changed: Any) -> dict[str, Any]:
    tensors = {
        "query": random(BATCH, HEADS, Q_LEN, QK_DIM),
        "key": random(BATCH, KV_HEADS, KV_LEN, QK_DIM),
        "value": random(BATCH, KV_HEADS, KV_LEN, V_DIM),
    }
    return tensors | changed


@pytest.fixture(params=["mha_spec.reference", "mha_spec_numpy", "mha_spec"])
def attention_module(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


ones = numpy.ones
BAD = {
    "query-rank": (
        {"query": random(HEADS, Q_LEN, QK_DIM)},
        ArgumentValueError,
        "query",
        "rank 4, (batch, heads, q_len, qk_dim)",
        "shape=(6, 5, 11)",
        "",
    ),
    "value-rank": (
        {"value": random(KV_LEN, V_DIM)},
        ArgumentValueError,
        "value",
        "rank 4, (batch, kv_heads, kv_len, v_dim)",
        "shape=(7, 13)",
        "",
    ),
    "query-list": ({"query": [[1.0]]}, ArgumentTypeError, "query", "an array", "list", ""),
    "key-none": ({"key": None}, ArgumentTypeError, "key", "an array", "NoneType", ""),
    "query-integers": (
        {"query": ones((BATCH, HEADS, Q_LEN, QK_DIM), int)},
        ArgumentTypeError,
        "query",
        "float64, float32, float16, bfloat16",
        "int64",
        "",
    ),
    "mixed-dtypes": (
        {"key": random(BATCH, KV_HEADS, KV_LEN, QK_DIM, dtype="float64")},
        ArgumentTypeError,
        "key",
        "dtype=float32",
        "dtype=float64",
        "Convert",
    ),
    "head-multiple": (
        {"query": random(BATCH, 5, Q_LEN, QK_DIM)},
        ArgumentValueError,
        "query",
        "multiple of kv_heads=3",
        "heads=5",
        "(batch, heads, length, size)",
    ),
    "no-heads": (
        {"query": random(BATCH, 0, Q_LEN, QK_DIM)},
        ArgumentValueError,
        "query",
        "heads>=1",
        "shape=(2, 0, 5, 11)",
        "",
    ),
    "no-size": (
        {"query": random(BATCH, HEADS, Q_LEN, 0), "key": random(BATCH, KV_HEADS, KV_LEN, 0)},
        ArgumentValueError,
        "query",
        "qk_dim>=1",
        "shape=(2, 6, 5, 0)",
        "",
    ),
    "batch": ({"key": random(3, KV_HEADS, KV_LEN, QK_DIM)}, ArgumentValueError, "key", "batch=2", "batch=3", ""),
    "qk-dim": ({"key": random(BATCH, KV_HEADS, KV_LEN, 10)}, ArgumentValueError, "key", "qk_dim=11", "qk_dim=10", ""),
    "kv-len": (
        {"value": random(BATCH, KV_HEADS, 8, V_DIM)},
        ArgumentValueError,
        "value",
        "(batch, kv_heads, kv_len)=(2, 3, 7)",
        "shape=(2, 3, 8, 13)",
        "",
    ),
    "mask-of-integers": (
        {"mask": ones((1, 1, 1, KV_LEN), int)},
        ArgumentTypeError,
        "mask",
        "boolean (True = may attend)",
        "int64",
        "mask != 0",
    ),
    "mask-of-floats": (
        {"mask": ones((1, 1, 1, KV_LEN))},
        ArgumentTypeError,
        "mask",
        "boolean (True = may attend)",
        "float64",
        "`bias`",
    ),
    "mask-rank": (
        {"mask": ones((Q_LEN, KV_LEN), bool)},
        ArgumentValueError,
        "mask",
        "rank 4",
        "shape=(5, 7)",
        "reshape",
    ),
    "mask-not-broadcastable": (
        {"mask": ones((1, 2, 1, KV_LEN), bool)},
        ArgumentValueError,
        "mask",
        "(2, 6, 5, 7)",
        "shape=(1, 2, 1, 7)",
        "",
    ),
    "mask-list": ({"mask": [[True]]}, ArgumentTypeError, "mask", "an array of rank 4", "list", ""),
    "dropout-mask-of-floats": (
        {"dropout_mask": ones((1, 1, Q_LEN, KV_LEN))},
        ArgumentTypeError,
        "dropout_mask",
        "True = keep",
        "float64",
        "",
    ),
    "bias-of-booleans": (
        {"bias": ones((1, 1, Q_LEN, KV_LEN), bool)},
        ArgumentTypeError,
        "bias",
        "float64, float32",
        "bool",
        "`mask`",
    ),
    "bias-not-broadcastable": (
        {"bias": ones((1, 1, Q_LEN, 6))},
        ArgumentValueError,
        "bias",
        "(2, 6, 5, 7)",
        "shape=(1, 1, 5, 6)",
        "",
    ),
    "sinks-shape": ({"sinks": ones(KV_HEADS)}, ArgumentValueError, "sinks", "(heads,)=(6,)", "shape=(3,)", ""),
    "sinks-of-integers": ({"sinks": ones(HEADS, int)}, ArgumentTypeError, "sinks", "float64, float32", "int64", ""),
    "causal-ambiguous": (
        {"causal": True},
        ArgumentValueError,
        "q_offset",
        "q_offset=0 (upper left",
        "q_offset=None",
        "q_offset=2 (lower right",
    ),
    "window-ambiguous": (
        {"window": (2, 0)},
        ArgumentValueError,
        "q_offset",
        "q_offset=0 (upper left",
        "q_offset=None",
        "window=(2, 0)",
    ),
    "causal-with-lengths": (
        {"query": random(BATCH, HEADS, KV_LEN, QK_DIM), "causal": True, "kv_lengths": [3, 7]},
        ArgumentValueError,
        "q_offset",
        "kv_lengths - q_len",
        "q_offset=None",
        "kv_lengths are given",
    ),
    "causal-number": ({"causal": 1}, ArgumentTypeError, "causal", "True or False", "causal=1", ""),
    "one-segment-array": (
        {"q_segment_ids": ones((BATCH, Q_LEN), int)},
        ArgumentValueError,
        "kv_segment_ids",
        "`q_segment_ids`",
        "kv_segment_ids=None",
        "same array",
    ),
    "other-segment-array": (
        {"kv_segment_ids": ones((BATCH, KV_LEN), int)},
        ArgumentValueError,
        "q_segment_ids",
        "`kv_segment_ids`",
        "q_segment_ids=None",
        "same array",
    ),
    "segments-shape": (
        {"q_segment_ids": ones((BATCH, KV_LEN), int), "kv_segment_ids": ones((BATCH, KV_LEN), int)},
        ArgumentValueError,
        "q_segment_ids",
        "(batch, q_len)=(2, 5)",
        "shape=(2, 7)",
        "",
    ),
    "segments-of-floats": (
        {"q_segment_ids": ones((BATCH, Q_LEN)), "kv_segment_ids": ones((BATCH, KV_LEN))},
        ArgumentTypeError,
        "q_segment_ids",
        "integer",
        "float64",
        "",
    ),
    "window-number": (
        {"window": 3, "q_offset": 0},
        ArgumentTypeError,
        "window",
        "pair (left, right)",
        "window=3",
        "window=(n - 1, 0)",
    ),
    "window-negative": (
        {"window": (-1, 0), "q_offset": 0},
        ArgumentValueError,
        "window",
        "0<=left<=2**30",
        "left=-1",
        "left=None for no bound",
    ),
    "window-float": (
        {"window": (1.0, 0), "q_offset": 0},
        ArgumentTypeError,
        "window",
        "integers or None",
        "left=1.0",
        "",
    ),
    "window-too-long": (
        {"window": (0, 2**31), "q_offset": 0},
        ArgumentValueError,
        "window",
        "2**30",
        f"right={2**31}",
        "",
    ),
    "softcap-zero": ({"softcap": 0.0}, ArgumentValueError, "softcap", "softcap>0", "softcap=0.0", "None is no cap"),
    "softcap-negative": ({"softcap": -30.0}, ArgumentValueError, "softcap", "softcap>0", "softcap=-30.0", ""),
    "softcap-infinite": ({"softcap": math.inf}, ArgumentValueError, "softcap", "finite", "softcap=inf", ""),
    "scale-nan": ({"scale": math.nan}, ArgumentValueError, "scale", "finite", "scale=nan", "1/sqrt(qk_dim)"),
    "scale-array": ({"scale": ones(())}, ArgumentTypeError, "scale", "Python number", "ndarray", ""),
    "dropout-one": (
        {"dropout_rate": 1.0},
        ArgumentValueError,
        "dropout_rate",
        "0<=dropout_rate<1",
        "dropout_rate=1.0",
        "",
    ),
    "dropout-negative": (
        {"dropout_rate": -0.1},
        ArgumentValueError,
        "dropout_rate",
        "0<=dropout_rate<1",
        "dropout_rate=-0.1",
        "",
    ),
    "dropout-text": ({"dropout_rate": "0.1"}, ArgumentTypeError, "dropout_rate", "Python number", "'0.1'", ""),
    "kv-lengths-beyond": ({"kv_lengths": [8, 0]}, ArgumentValueError, "kv_lengths", "0<=kv_lengths<=kv_len=7", "8", ""),
    "kv-lengths-negative": (
        {"kv_lengths": numpy.asarray([3, -1])},
        ArgumentValueError,
        "kv_lengths",
        "0<=kv_lengths",
        "-1",
        "",
    ),
    "q-lengths-beyond": ({"q_lengths": (5, 6)}, ArgumentValueError, "q_lengths", "0<=q_lengths<=q_len=5", "6", ""),
    "lengths-shape": (
        {"kv_lengths": numpy.asarray([7])},
        ArgumentValueError,
        "kv_lengths",
        "(batch,)=(2,)",
        "shape=(1,)",
        "",
    ),
    "lengths-of-floats": (
        {"kv_lengths": numpy.asarray([7.0, 7.0])},
        ArgumentTypeError,
        "kv_lengths",
        "integer",
        "float64",
        "",
    ),
    "lengths-number": ({"kv_lengths": 7}, ArgumentTypeError, "kv_lengths", "(batch,)=(2,)", "kv_lengths=7", ""),
    "offset-too-far": (
        {"q_offset": 2**30 + 1, "causal": True},
        ArgumentValueError,
        "q_offset",
        "2**30",
        str(2**30 + 1),
        "",
    ),
    "offset-float": ({"q_offset": 1.5, "causal": True}, ArgumentTypeError, "q_offset", "integers", "1.5", ""),
    "unknown-keyword": ({"is_causal": True}, ArgumentTypeError, "is_causal", "not an option", "is_causal", "`causal`"),
    "unknown-mask": (
        {"attn_mask": ones((1, 1, 1, KV_LEN), bool)},
        ArgumentTypeError,
        "attn_mask",
        "not an option",
        "attn_mask",
        "`mask`",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_refused(attention_module: ModuleType, name: str) -> None:
    changed, error, argument, expectation, received, fix = BAD[name]
    with pytest.raises(MhaSpecError) as caught:
        attention_module.attention(**arguments(**changed))
    assert type(caught.value) is error
    message = str(caught.value)
    assert f"`{argument}`" in message
    for part in (expectation, received, fix):
        assert part in message
    assert re.search(r"\[MHA-[A-Z]+-\d+\]$", message)


@pytest.mark.parametrize(
    "name",
    sorted(
        set(BAD) - {"value-rank", "kv-len", "dropout-mask-of-floats", "dropout-one", "dropout-negative", "dropout-text"}
    ),
)
def test_weights_and_gradients_refuse_the_same(attention_module: ModuleType, name: str) -> None:
    changed, error, argument, *_ = BAD[name]
    given = arguments(**changed)
    without_value = {key: value for key, value in given.items() if key != "value"}
    grad_output = random(BATCH, HEADS, Q_LEN, V_DIM)
    for call in (
        lambda: attention_module.attention_weights(**without_value),
        lambda: attention_module.attention_vjp(grad_output, **given),
    ):
        with pytest.raises(error, match=f"`{argument}`"):
            call()


def test_weights_take_no_dropout(attention_module: ModuleType) -> None:
    given = {name: value for name, value in arguments().items() if name != "value"}
    with pytest.raises(ArgumentTypeError, match="`dropout_rate`"):
        attention_module.attention_weights(**given, dropout_rate=0.1)


def test_gradients_draw_no_dropout(attention_module: ModuleType) -> None:
    with pytest.raises(ArgumentValueError, match=r"`dropout_mask` must be given with dropout_rate=0\.1"):
        attention_module.attention_vjp(random(BATCH, HEADS, Q_LEN, V_DIM), **arguments(dropout_rate=0.1))


@pytest.mark.parametrize(
    ("cotangents", "argument"),
    [
        ({"grad_output": random(BATCH, HEADS, Q_LEN, QK_DIM)}, "grad_output"),
        ({"grad_output": random(BATCH, HEADS, Q_LEN, V_DIM), "grad_lse": random(BATCH, HEADS, KV_LEN)}, "grad_lse"),
        ({"grad_output": random(BATCH, HEADS, Q_LEN, V_DIM), "grad_lse": random(BATCH, HEADS, Q_LEN, 1)}, "grad_lse"),
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
        ({"lse_b": random(BATCH, HEADS, Q_LEN, 1)}, ArgumentValueError, "lse_b"),
        ({"output_b": random(BATCH, HEADS, Q_LEN, QK_DIM)}, ArgumentValueError, "output_b"),
        ({"lse_a": [0.0]}, ArgumentTypeError, "lse_a"),
    ],
)
def test_halves_fit(
    attention_module: ModuleType, changed: dict[str, Any], error: type[Exception], argument: str
) -> None:
    halves = {name: random(BATCH, HEADS, Q_LEN, V_DIM) for name in ("output_a", "output_b")}
    halves |= {name: random(BATCH, HEADS, Q_LEN) for name in ("lse_a", "lse_b")}
    with pytest.raises(error, match=f"`{argument}` must"):
        attention_module.merge_attention(**(halves | changed))


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
def test_lengths_that_cannot_be_read_act_clamped(library: str) -> None:
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
    given = {"q_offset": 2, "window": (1, 2), "kv_lengths": [5, 6]}
    of_numpy = {
        "q_offset": numpy.int64(2),
        "window": (numpy.uint8(1), numpy.int32(2)),
        "kv_lengths": [numpy.int64(5), numpy.int8(6)],
    }
    expected = attention_module.attention(**arguments(), **given)
    assert numpy.array_equal(attention_module.attention(**arguments(), **of_numpy), expected)


@pytest.mark.parametrize("number", [{"scale": 10**400}, {"softcap": 1e300}, {"scale": -1e39}], ids=str)
def test_numbers_beyond_the_softmax_are_refused(attention_module: ModuleType, number: dict[str, float]) -> None:
    with pytest.raises(ArgumentValueError, match=f"`{next(iter(number))}` must be finite"):
        attention_module.attention(**arguments(), **number)


@pytest.mark.parametrize("library", ["torch", "jax", "array_api_strict"])
def test_wide_segment_ids_are_told_apart(library: str) -> None:
    xp = pytest.importorskip({"jax": "jax.numpy"}.get(library, library))
    import mha_spec_numpy
    from mha_spec import reference

    near, far = arguments(), arguments()
    far["value"][:, :, 3:] += 1
    ids = {"q_segment_ids": numpy.ones((BATCH, Q_LEN), "int64"), "kv_segment_ids": numpy.ones((BATCH, KV_LEN), "int64")}
    ids["kv_segment_ids"][:, 3:] += 2**32
    for module in (reference, mha_spec_numpy):
        for dtype in ("int64", "uint64"):
            given = {name: array.astype(dtype) for name, array in ids.items()}
            first, second = (
                numpy.asarray(module.attention(**{name: xp.asarray(array) for name, array in one.items()}, **given))
                for one in (near, far)
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
    given = arguments()
    operands = {
        "attention": (given["query"], given["key"], given["value"]),
        "attention_weights": (given["query"], given["key"]),
        "attention_vjp": (random(BATCH, HEADS, Q_LEN, V_DIM), given["query"], given["key"], given["value"]),
    }
    with pytest.raises(ArgumentTypeError, match=f"`{option}` is not an option of {function}.*") as caught:
        getattr(attention_module, function)(*operands[function], **{option: 1})
    assert words in str(caught.value)


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex64"])
def test_cotangents_and_halves_are_floating(attention_module: ModuleType, dtype: str) -> None:
    output, lse = random(BATCH, HEADS, Q_LEN, V_DIM), random(BATCH, HEADS, Q_LEN)
    with pytest.raises(ArgumentTypeError, match="`grad_output` must have a dtype"):
        attention_module.attention_vjp(output.astype(dtype), **arguments())
    with pytest.raises(ArgumentTypeError, match="`lse_b` must have a dtype"):
        attention_module.merge_attention(output, lse, output, lse.astype(dtype))
    with pytest.raises(ArgumentTypeError, match="`lse_b` must have the dtype of the other half"):
        attention_module.merge_attention(output, lse, output, lse.astype("float64"))


def test_the_half_beside_an_empty_one_is_unchanged(attention_module: ModuleType) -> None:
    output, lse = random(BATCH, HEADS, Q_LEN, V_DIM, dtype="float64"), random(BATCH, HEADS, Q_LEN)
    lse[0, 0, 0] = numpy.inf
    empty, garbage = numpy.full_like(lse, -numpy.inf), numpy.full_like(output, numpy.nan)
    for merged in (
        attention_module.merge_attention(output, lse, garbage, empty),
        attention_module.merge_attention(garbage, empty, output, lse),
    ):
        assert [part.dtype for part in merged] == [numpy.float64, numpy.float32]
        assert numpy.array_equal(merged[0], output)
        assert numpy.array_equal(merged[1], lse)


def test_every_right_argument_is_taken(attention_module: ModuleType) -> None:
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
