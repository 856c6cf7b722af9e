"""Arrays that do not hold an element for every index raise an error of ours in every argument (MHA-ARG-4)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.calls import BATCH, HEADS, KV_LEN, Q_LEN, V_DIM, arguments
from support.numbers import numbers

from mha_spec import ArgumentTypeError, KVCache, MhaSpecError, reference
from mha_spec.arrays import library_of, storage_of
from mha_spec.checks import check_library

if TYPE_CHECKING:
    from collections.abc import Callable

    Make = dict[str, Callable[[Any], Any]]


def of_numpy() -> Make:
    return {
        "masked": numpy.ma.masked_array,
        "objects": lambda x: x.astype(object),
        "text": lambda x: x.astype(str),
        "fields": lambda x: numpy.zeros(x.shape, "f4,f4"),
        "list": lambda x: x.tolist(),
        "finfo": lambda _: numpy.finfo("float32"),
        "class": lambda _: numpy.ndarray,
        "word": lambda _: "causal",
    }


def of_torch() -> Make:
    torch = pytest.importorskip("torch")
    return {
        "coo": lambda x: x.to_sparse(),
        "csr": lambda x: x.reshape(-1, x.shape[-1]).to_sparse_csr(),
        "nested": lambda x: torch.nested.nested_tensor(list(x)),
        "jagged": lambda x: torch.nested.nested_tensor([entry.reshape(-1, 1) for entry in x], layout=torch.jagged),
        "dtype": lambda x: x.dtype,
        "masked": lambda x: torch.masked.masked_tensor(x, x == x),
        "lazy": lambda _: torch.nn.UninitializedParameter(),
    }


def of_jax() -> Make:
    jax = pytest.importorskip("jax")
    from jax.experimental import sparse

    return {
        "bcoo": sparse.BCOO.fromdense,
        "description": lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        "abstract": lambda x: jax.core.ShapedArray(x.shape, x.dtype),
        "key": lambda _: jax.random.key(0),
    }


KINDS: dict[str, tuple[Callable[[], Make], tuple[str, ...]]] = {
    "numpy": (of_numpy, ("masked", "objects", "text", "fields", "list", "finfo", "class", "word")),
    "torch": (of_torch, ("coo", "csr", "nested", "jagged", "dtype", "masked", "lazy")),
    "jax": (of_jax, ("bcoo", "description", "abstract", "key")),
}
by_kind = pytest.mark.parametrize(
    ("library", "name"), [(library, name) for library, (_, names) in KINDS.items() for name in names]
)


def converter(library: str) -> Callable[[numpy.ndarray], Any]:
    """Return the function that converts arrays of NumPy to a library."""
    return pytest.importorskip({"jax": "jax.numpy"}.get(library, library)).asarray


def wrong(library: str, name: str) -> Any:
    """Make an object of a kind that is not accepted from an array like the query."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return KINDS[library][0]()[name](converter(library)(arguments()["query"]))


def right(library: str) -> dict[str, Any]:
    """Make the arguments of a call of attention with every optional array."""
    further = {
        "mask": numpy.ones((1, 1, Q_LEN, KV_LEN), bool),
        "bias": numpy.ones((1, 1, Q_LEN, KV_LEN), "float32"),
        "sinks": numpy.ones(HEADS, "float32"),
        "dropout_mask": numpy.ones((1, 1, Q_LEN, KV_LEN), bool),
        "q_segment_ids": numpy.ones((BATCH, Q_LEN), "int32"),
        "kv_segment_ids": numpy.ones((BATCH, KV_LEN), "int32"),
        "kv_lengths": numpy.full(BATCH, 3, "int32"),
    }
    return {name: converter(library)(array) for name, array in (arguments() | further).items()}


@by_kind
@pytest.mark.parametrize(
    "argument",
    ["query", "key", "value", "mask", "bias", "sinks", "dropout_mask", "q_segment_ids", "kv_segment_ids", "kv_lengths"],
)
def test_attention_refuses_the_kind(library: str, name: str, argument: str) -> None:
    with pytest.raises(MhaSpecError, match=f"`{argument}` must "):
        reference.attention(**right(library) | {argument: wrong(library, name)})


@by_kind
def test_every_other_function_refuses_the_kind(library: str, name: str) -> None:
    convert, bad = converter(library), wrong(library, name)
    operands = {key: convert(array) for key, array in arguments().items()}
    output, lse = convert(numbers(BATCH, HEADS, Q_LEN, V_DIM)), convert(numbers(BATCH, HEADS, Q_LEN))
    tokens, weight = convert(numbers(2, 3, 4)), convert(numbers(4, 1, 2))
    params = {"w_q": weight, "w_k": weight, "w_v": weight, "w_o": convert(numbers(1, 2, 4))}
    buffer, new = convert(numbers(2, 1, 5, 2)), convert(numbers(2, 1, 1, 2))
    calls: list[Callable[[], Any]] = [
        lambda: reference.attention_vjp(bad, **operands),
        lambda: reference.attention_vjp(output, **operands, grad_lse=bad),
        lambda: reference.merge_attention(bad, lse, output, lse),
        lambda: reference.merge_attention(output, lse, output, bad),
        lambda: reference.merge_attention_vjp(bad, output, lse, output, lse),
        lambda: reference.multi_head_attention(bad, tokens, tokens, params),
        lambda: reference.multi_head_attention(tokens, bad, tokens, params),
        lambda: reference.multi_head_attention(tokens, tokens, tokens, params | {"w_v": bad}),
        lambda: reference.rotary_embedding(bad, [0, 1, 2, 3, 4]),
        lambda: reference.rotary_embedding(new, bad),
        lambda: reference.alibi_bias(bad, 3, 3),
        lambda: reference.alibi_bias(2, 3, 3, q_offset=bad),
        lambda: reference.empty_cache(1, 2, 3, 4, like=bad),
        lambda: reference.append_cache(KVCache(bad, buffer, [0, 0]), new, new),
        lambda: reference.append_cache(KVCache(buffer, buffer, bad), new, new),
        lambda: reference.append_cache(KVCache(buffer, buffer, [0, 0]), new, bad),
    ]
    for call in calls:
        with pytest.raises(MhaSpecError, match="` must "):
            call()


def test_arrays_of_tensorflow_that_are_not_dense_have_no_library() -> None:
    tf = pytest.importorskip("tensorflow")
    dense = tf.ones((2, 3))
    kinds = [tf.sparse.from_dense(dense), tf.ragged.constant([[1.0], [2.0, 3.0]]), tf.TensorSpec((2, 3), tf.float32)]
    kinds.append(tf.IndexedSlices(dense, tf.constant([0, 1])))
    assert [library_of(kind) for kind in kinds] == [None] * 4
    assert library_of(dense) == library_of(tf.Variable(dense)) == "tensorflow"


def test_views_and_subclasses_of_torch_are_dense() -> None:
    torch = pytest.importorskip("torch")
    plain = torch.ones(3, 4)
    dense = (plain, plain.T, plain[::2], plain.expand(2, 3, 4), torch.nn.Parameter(plain), plain.to("meta"))
    assert [storage_of(tensor) for tensor in dense] == [None] * 6
    assert storage_of(plain.to_sparse()) == "sparse_coo"


def test_a_library_without_a_namespace_is_refused_by_us() -> None:
    class Array:
        """An array of a library without the Python array API."""

        __module__ = "elsewhere"
        dtype, shape, ndim, device = numpy.dtype("float32"), (2, 3, 5, 7), 4, None

        def __mul__(self, other: object) -> object:
            return self

    with pytest.raises(ArgumentTypeError, match="Python array API or of a library that has a backend, received Array"):
        reference.attention(Array(), Array(), Array())


def test_a_backend_that_is_called_by_name_takes_arrays_of_its_library() -> None:
    torch = pytest.importorskip("torch")
    check_library("torch", torch.ones(1))
    for other in (numpy.ones(1), [1.0], None):
        with pytest.raises(ArgumentTypeError, match="`query` must be an array of torch"):
            check_library("torch", other)
