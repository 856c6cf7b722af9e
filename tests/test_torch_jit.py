"""mha_spec_torch in graphs of torch.jit.trace: they follow every argument, in values and in sizes, or refuse it."""

from __future__ import annotations

from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch
from support.comparisons import assert_near
from support.layers import EMBED, KV_HEADS, V_DIM
from support.numbers import numbers
from support.torch_world import filled, tensor
from torch.autograd import forward_ad

import mha_spec_torch
from mha_spec import KVCache, PagedKVCache, WindowKVCache
from mha_spec.errors import ArgumentTypeError, ArgumentValueError
from mha_spec_torch import fused

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Case = tuple[Callable[..., Any], list[tuple[Any, ...]]]

pytestmark = pytest.mark.usefixtures("quiet")

attention: Callable[..., Any] = mha_spec_torch.attention
layer_of: Callable[..., Any] = mha_spec_torch.multi_head_attention
varlen: Callable[..., Any] = mha_spec_torch.varlen_attention
weights_of: Callable[..., Any] = mha_spec_torch.attention_weights

SEEDS = count(11)


def drawn(*shape: int) -> Tensor:
    """Draw numbers that no other call draws."""
    return tensor(numbers(*shape, seed=next(SEEDS)), "float64")


def some(*shape: int) -> Tensor:
    """Draw a mask that is True for about half of all pairs."""
    return drawn(*shape) > 0


def ints(*values: Any) -> Tensor:
    return torch.tensor(values)


def queries(batch: int = 2, length: int = 5) -> Tensor:
    return drawn(batch, 3, length, 4)


def operands(batch: int = 2, q_len: int = 5, kv_len: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    return queries(batch, q_len), queries(batch, kv_len), queries(batch, kv_len)


def halves(batch: int, length: int) -> list[Tensor]:
    return [drawn(batch, 3, length, 4), drawn(batch, 3, length), drawn(batch, 3, length, 4), drawn(batch, 3, length)]


def packed(tokens: int) -> Tensor:
    return drawn(tokens, 3, 4)


def offset_of_sizes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, causal=True, q_offset=k.shape[2] - q.shape[2])


def starts_and_lengths(q: Tensor, k: Tensor, v: Tensor, offset: Tensor, lengths: Tensor, starts: Tensor) -> Any:
    return attention(q, k, v, causal=True, q_offset=offset, q_lengths=lengths, kv_starts=starts, return_lse=True)


def windows_of_packed(q: Tensor, k: Tensor, bounds: Tensor, kv_bounds: Tensor, offset: Tensor, used: Tensor) -> Any:
    return varlen(q, k, k, bounds, kv_bounds, window=(2, 1), q_offset=offset, seqused_kv=used)


ATTENTION: dict[str, Case] = {
    "kv_lengths": (
        lambda q, k, v, n: attention(q, k, v, kv_lengths=n, return_lse=True),
        [(*operands(), ints(3, 5)), (*operands(), ints(7, 0)), (*operands(3, 2, 11), ints(1, 11, 4))],
    ),
    "prefix_lengths": (
        lambda q, k, v, n: attention(q, k, v, causal=True, q_offset=0, prefix_lengths=n),
        [(*operands(), ints(3, 5)), (*operands(), ints(7, 0)), (*operands(3, 2, 11), ints(1, 11, 4))],
    ),
    "q_offset, q_lengths and kv_starts": (
        starts_and_lengths,
        [
            (*operands(), ints(3, 5), ints(5, 2), ints(0, 1)),
            (*operands(), ints(0, -2), ints(0, 5), ints(3, 2)),
            (*operands(1, 3, 13), ints(9), ints(2), ints(3)),
        ],
    ),
    "q_offset without axes": (
        lambda q, k, v, offset: attention(q, k, v, causal=True, q_offset=offset),
        [(*operands(), torch.tensor(2)), (*operands(), torch.tensor(-1)), (*operands(3, 2, 11), torch.tensor(6))],
    ),
    "q_offset of sizes": (offset_of_sizes, [operands(), operands(3, 2, 11)]),
    "a named offset": (
        lambda q, k, v, n: attention(q, k, v, causal=True, q_offset="lower_right", kv_lengths=n),
        [(*operands(), ints(3, 5)), (*operands(), ints(7, 0)), (*operands(3, 2, 11), ints(1, 11, 4))],
    ),
    "segments": (
        lambda q, k, v, a, b: attention(q, k, v, q_segment_ids=a, kv_segment_ids=b),
        [
            (*operands(1, 3, 5), ints([0, 1, 1]), ints([0, 0, 1, 1, 1])),
            (*operands(1, 3, 5), ints([2, 1, 0]), ints([0, 1, 2, 2, 2])),
            (*operands(1, 2, 3), ints([4, 7]), ints([7, 4, 4])),
        ],
    ),
    "mask": (
        lambda q, k, v, mask: attention(q, k, v, mask=mask),
        [(*operands(), some(2, 1, 5, 7)), (*operands(), some(2, 1, 5, 7)), (*operands(3, 2, 11), some(3, 1, 2, 11))],
    ),
    "bias and sinks": (
        lambda q, k, v, bias, sinks: attention(q, k, v, bias=bias, sinks=sinks, softcap=2.0),
        [(*operands(), drawn(2, 1, 5, 7), drawn(3)), (*operands(3, 2, 11), drawn(1, 1, 2, 11), drawn(3))],
    ),
    "dropout_mask": (
        lambda q, k, v, mask: attention(q, k, v, dropout_mask=mask, dropout_rate=0.5),
        [(*operands(), some(2, 1, 5, 7)), (*operands(), some(2, 1, 5, 7))],
    ),
    "weights": (
        lambda q, k, n: weights_of(q, k, kv_lengths=n),
        [(queries(), queries(2, 7), ints(3, 5)), (queries(3, 2), queries(3, 11), ints(0, 11, 1))],
    ),
    "gradients": (
        lambda g, q, k, v, n, mask: mha_spec_torch.attention_vjp(g, q, k, v, kv_lengths=n, mask=mask)[:3],
        [
            (queries(), *operands(), ints(3, 5), some(2, 1, 5, 7)),
            (queries(3, 2), *operands(3, 2, 11), ints(0, 11, 1), some(3, 1, 2, 11)),
        ],
    ),
    "merged": (mha_spec_torch.merge_attention, [(*halves(2, 5),), (*halves(3, 2),)]),
    "gradients of merged": (
        lambda g, of_lse, *a: mha_spec_torch.merge_attention_vjp(g, *a, grad_lse=of_lse),
        [(*halves(2, 5)[:2], *halves(2, 5)), (*halves(3, 2)[:2], *halves(3, 2))],
    ),
    "packed": (
        lambda q, k, a, b: varlen(q, k, k, a, b, causal=True, q_offset="lower_right", return_lse=True),
        [
            (packed(6), packed(8), ints(0, 2, 6), ints(0, 3, 8)),
            (packed(6), packed(8), ints(0, 5, 6), ints(0, 7, 8)),
            (packed(7), packed(5), ints(0, 1, 4, 7), ints(0, 1, 4, 5)),
        ],
    ),
    "packed with offsets and lengths": (
        windows_of_packed,
        [
            (packed(6), packed(8), ints(0, 2, 6), ints(0, 3, 8), ints(1, 2), ints(2, 5)),
            (packed(6), packed(8), ints(0, 5, 6), ints(0, 7, 8), ints(0, 3), ints(7, 1)),
        ],
    ),
    "blocks": (
        lambda q, pool, a, table, used: varlen(q, pool, pool, a, None, block_table=table, seqused_kv=used),
        [
            (packed(6), drawn(3, 2, 3, 4), ints(0, 2, 6), ints([0, 1], [2, 0]), ints(3, 4)),
            (packed(6), drawn(3, 2, 3, 4), ints(0, 5, 6), ints([2, 1], [1, 0]), ints(1, 2)),
        ],
    ),
    "gradients of packed": (
        lambda g, q, a: mha_spec_torch.varlen_attention_vjp(g, q, q, q, a, a, causal=True)[:3],
        [(packed(6), packed(6), ints(0, 2, 6)), (packed(6), packed(6), ints(0, 5, 6))],
    ),
}

LAYER = filled(mha_spec_torch.MultiHeadAttention(EMBED, 3, qk_dim=4, dtype=torch.float64)).requires_grad_(False)
ROTARY = filled(mha_spec_torch.MultiHeadAttention(EMBED, 3, qk_dim=4, rotary={}, dtype=torch.float64))
ROTARY.requires_grad_(False)


def tokens(batch: int = 2, length: int = 5) -> Tensor:
    return drawn(batch, length, EMBED)


def rotated(x: Tensor, positions: Any, **options: Any) -> Tensor:
    return mha_spec_torch.rotary_embedding(x, positions, **options)


LAYERS: dict[str, Case] = {
    "layer": (
        lambda x, n: LAYER(x, kv_lengths=n),
        [(tokens(), ints(3, 5)), (tokens(), ints(0, 2)), (tokens(3, 7), ints(1, 7, 4))],
    ),
    "layer with rotary": (
        lambda x, offset: ROTARY(x, causal=True, q_offset=offset),
        [(tokens(), ints(0, 3)), (tokens(), ints(5, 3)), (tokens(3, 7), ints(4, 1, 0))],
    ),
    "another length than the keys": (
        lambda x, y: ROTARY(x, y, causal=True, q_offset="lower_right"),
        [(tokens(), tokens()), (tokens(2, 1), tokens(2, 7)), (tokens(2, 3), tokens(2, 11))],
    ),
    "layer with positions": (
        lambda x, positions: ROTARY(x, positions=positions),
        [(tokens(), torch.arange(5)), (tokens(), torch.arange(5).flip(0)), (tokens(3, 7), torch.arange(7))],
    ),
    "rotary": (
        rotated,
        [(queries(), torch.arange(5)), (queries(), torch.arange(5) + 11), (queries(3, 2), torch.arange(2))],
    ),
    "rotary of another head size": (
        lambda x: rotated(x, torch.arange(x.shape[2])),
        [(drawn(2, 3, 5, 4),), (drawn(2, 3, 7, 6),), (drawn(1, 3, 2, 14),)],
    ),
    "rotary with frequencies": (
        lambda x, positions, rates: rotated(x, positions, frequencies=rates),
        [(queries(), torch.arange(5), drawn(2)), (queries(), torch.arange(5) + 1, drawn(2))],
    ),
    "rotary with sections": (
        partial(rotated, sections=[1, 1]),
        [(queries(), torch.arange(20).view(2, 2, 5)), (queries(), torch.arange(20).view(2, 2, 5).flip(0))],
    ),
    "alibi": (
        lambda q, k: mha_spec_torch.alibi_bias(3, q.shape[2], k.shape[2], q_offset="lower_right").double(),
        [(queries(), queries(2, 7)), (queries(2, 3), queries(2, 11)), (queries(2, 3), queries(2, 0))],
    ),
    "alibi from no keys": (
        lambda slopes, k: mha_spec_torch.alibi_bias(slopes, 5, k.shape[2], q_offset=2),
        [(drawn(3), queries(2, 0)), (drawn(3), queries(2, 7))],
    ),
    "alibi with slopes and offsets": (
        lambda slopes, offset: mha_spec_torch.alibi_bias(slopes, 5, 7, q_offset=offset),
        [(drawn(3), ints(0, 2)), (drawn(3), ints(1, -2)), (drawn(5), ints(1, 2, 3))],
    ),
}

PARAMS = dict(
    filled(mha_spec_torch.MultiHeadAttention(EMBED, 3, kv_heads=KV_HEADS, qk_dim=4, v_dim=V_DIM)).double().params
)
PARAMS = {name: parameter.detach() for name, parameter in PARAMS.items()}
SIZES = KV_HEADS, 13, 4, V_DIM
"""kv_heads, capacity, qk_dim and v_dim of the caches."""


def appended(x: Tensor, cache: Any, **options: Any) -> list[Tensor]:
    """Return the output of a step, and the buffers of the new cache."""
    output, new = layer_of(x, x, x, PARAMS, cache=cache, causal=True, rotary={}, **options)
    return [output, new.key, new.value]


def made(x: Tensor, kind: Callable[..., Any] = KVCache, batch: int = 2) -> Any:
    return kind(*mha_spec_torch.empty_cache(batch, *SIZES, like=x))


def buffers(batch: int, *sizes: int) -> list[Tensor]:
    return [drawn(batch, KV_HEADS, *sizes, 4), drawn(batch, KV_HEADS, *sizes, V_DIM)]


def with_window(x: Tensor, key: Tensor, value: Tensor, lengths: Any) -> list[Tensor]:
    return appended(x, WindowKVCache(key, value, lengths), window=(3, None))


TABLE = numpy.arange(6).reshape(2, 3)
TABLES = torch.from_numpy(TABLE)


def blocks(x: Tensor, table: Any = TABLE) -> PagedKVCache:
    return PagedKVCache.empty(table, 6, 5, KV_HEADS, 4, V_DIM, like=x)


def pools(count: int) -> list[Tensor]:
    return [drawn(count, 5, KV_HEADS, 4), drawn(count, 5, KV_HEADS, V_DIM)]


def of_host(kind: Callable[..., Any], *storage: Any) -> Case:
    """Return a step with a cache outside of the trace, with lengths on the host."""
    options = {"window": (3, None)} if kind is WindowKVCache else {}
    cache = kind(*storage[:2], numpy.array([2, 2], numpy.int32), *storage[2:])
    return partial(appended, cache=cache, **options), [(tokens(2, 1),), (tokens(2, 1),), (tokens(2, 3),)]


LENGTHS = numpy.array([2, 2], numpy.int32)
CACHES: dict[str, Case] = {
    "made inside": (lambda x: appended(x, made(x)), [(tokens(),), (tokens(),), (tokens(2, 7),)]),
    "made for every batch": (
        lambda x: appended(x, made(x, batch=x.shape[0])),
        [(tokens(),), (tokens(1, 1),), (tokens(3, 7),)],
    ),
    "made inside, with lengths": (
        lambda x, n: appended(x, made(x), kv_lengths=n),
        [(tokens(), ints(2, 5)), (tokens(), ints(1, 0)), (tokens(2, 7), ints(7, 0))],
    ),
    "two steps": (
        lambda x: appended(x, layer_of(x, x, x, PARAMS, cache=made(x), causal=True, rotary={})[1]),
        [(tokens(),), (tokens(),), (tokens(2, 6),)],
    ),
    "an argument": (
        lambda x, key, value, n: appended(x, KVCache(key, value, n)),
        [
            (tokens(), *buffers(2, 13), ints(1, 3)),
            (tokens(), *buffers(2, 13), ints(6, 0)),
            (tokens(3, 2), *buffers(3, 17), ints(6, 0, 14)),
        ],
    ),
    "keys of another length": (
        lambda x, y, key, value, n: layer_of(x, y, y, PARAMS, cache=KVCache(key, value, n), rotary={})[0],
        [
            (tokens(), tokens(), *buffers(2, 13), ints(1, 3)),
            (tokens(2, 1), tokens(2, 3), *buffers(2, 13), ints(6, 0)),
        ],
    ),
    "no tokens at first": (
        lambda x, key, value, n: appended(x, KVCache(key, value, n)),
        [(tokens(2, 0), *buffers(2, 13), ints(1, 3)), (tokens(), *buffers(2, 13), ints(6, 0))],
    ),
    "no tokens later": (
        lambda x, key, value, n: appended(x, KVCache(key, value, n)),
        [(tokens(), *buffers(2, 13), ints(1, 3)), (tokens(2, 0), *buffers(2, 13), ints(6, 0))],
    ),
    "weights": (
        lambda x: mha_spec_torch.multi_head_attention_weights(x, x, PARAMS, cache=made(x), causal=True),
        [(tokens(),), (tokens(),), (tokens(2, 3),)],
    ),
    "output and weights": (
        lambda x: mha_spec_torch.multi_head_attention_and_weights(x, x, x, PARAMS, cache=made(x), causal=True)[:2],
        [(tokens(),), (tokens(),), (tokens(2, 3),)],
    ),
    "append": (
        lambda key, value: made(key).append(key, value)[:2],
        [tuple(buffers(2, 5)), tuple(buffers(2, 5)), tuple(buffers(2, 7))],
    ),
    "window made inside": (
        lambda x: appended(x, made(x, WindowKVCache), window=(3, None)),
        [(tokens(),), (tokens(),), (tokens(2, 7),)],
    ),
    "window, an argument": (
        with_window,
        [
            (tokens(2, 1), *buffers(2, 4), ints(1, 9)),
            (tokens(2, 1), *buffers(2, 4), ints(6, 0)),
            (tokens(3, 2), *buffers(3, 7), ints(6, 0, 14)),
        ],
    ),
    "window, append": (
        lambda key, value: WindowKVCache(*empty_buffers(), [0, 0]).append(key, value)[:2],
        [tuple(buffers(2, 2)), tuple(buffers(2, 5)), tuple(buffers(2, 7))],
    ),
    "window, no tokens at first": (
        with_window,
        [(tokens(2, 0), *buffers(2, 5), ints(1, 9)), (tokens(), *buffers(2, 5), ints(6, 0))],
    ),
    "blocks made inside": (lambda x: appended(x, blocks(x)), [(tokens(),), (tokens(),), (tokens(2, 7),)]),
    "blocks of an argument": (
        lambda x, table: appended(x, blocks(x, table)),
        [(tokens(1, 1), ints([3, 1])), (tokens(1, 4), ints([2, 0])), (tokens(2, 7), TABLES)],
    ),
    "blocks, an argument": (
        lambda x, key, value, n, table: appended(x, PagedKVCache(key, value, n, table)),
        [
            (tokens(), *pools(6), ints(1, 4), TABLES),
            (tokens(), *pools(6), ints(6, 0), TABLES[:, [2, 0, 1]]),
            (tokens(1, 2), *pools(4), ints(1), ints([3, 1])),
        ],
    ),
    "outside": of_host(KVCache, *buffers(2, 13)),
    "window outside": of_host(WindowKVCache, *buffers(2, 4)),
    "blocks outside": of_host(PagedKVCache, *pools(6), TABLE),
    "only read": (
        lambda x, key, value: layer_of(x, None, None, PARAMS, cache=KVCache(key, value, LENGTHS), causal=True)[0],
        [(tokens(2, 1), *buffers(2, 13)), (tokens(2, 3), *buffers(2, 13))],
    ),
}


def empty_buffers() -> tuple[Tensor, Tensor]:
    return torch.zeros(2, KV_HEADS, 3, 4).double(), torch.zeros(2, KV_HEADS, 3, V_DIM).double()


def recorded(call: Callable[..., Any], example: tuple[Any, ...]) -> Any:
    """Trace a call, and leave the comparison of values to the test."""

    def named(*arguments: Any) -> Any:
        return call(*arguments)

    return torch.jit.trace(named, example, check_trace=False)


CASES: dict[str, Case] = {f"attention: {name}": case for name, case in ATTENTION.items()}
CASES |= {f"layer: {name}": case for name, case in LAYERS.items()}
CASES |= {f"cache: {name}": case for name, case in CACHES.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_graph_follows_its_arguments(name: str) -> None:
    call, examples = CASES[name]
    graph = recorded(call, examples[0])
    for arguments in examples:
        results, expected = graph(*arguments), call(*arguments)
        assert_near(as_list(results), as_list(expected))


def as_list(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, torch.Tensor) else list(results)


def test_a_graph_returns_a_cache() -> None:
    graph = recorded(lambda x: layer_of(x, x, x, PARAMS, cache=made(x), causal=True), (tokens(),))
    _, (key, value, lengths) = graph(tokens(2, 7))
    assert (key.shape, value.shape) == ((2, KV_HEADS, 13, 4), (2, KV_HEADS, 13, V_DIM))
    assert (lengths.dtype, lengths.tolist()) == (torch.int32, [7, 7])


def test_no_trace_writes_to_a_cache() -> None:
    x = tokens()
    cache = made(x).append(*buffers(2, 3))
    before = cache.key.clone()
    recorded(lambda x: appended(x, cache), (x,))
    assert torch.equal(cache.key, before)
    assert cache.append(*buffers(2, 1)).key is cache.key


def test_a_step_of_no_tokens_is_not_repeated_for_tokens() -> None:
    graph = recorded(lambda x: appended(x, blocks(x)), (tokens(2, 0),))
    with pytest.raises(RuntimeError):
        graph(tokens())


def test_every_run_of_a_graph_draws_dropout() -> None:
    q = queries()
    graph = recorded(lambda q: attention(q, q, q, dropout_rate=0.5), (q,))
    assert not torch.equal(graph(q), graph(q))


def test_a_trace_chooses_no_kernel_by_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where the kernel of the example would compute every later call."""
    monkeypatch.setattr(fused, "on_cuda", lambda _: True)
    call = partial(attention, causal=True, q_offset="lower_right")
    graph = recorded(call, operands(2, 5, 5))
    arguments = operands(2, 3, 7)
    assert_near(graph(*arguments), call(*arguments))


def test_a_graph_refuses_lengths_that_need_an_offset() -> None:
    graph = recorded(lambda q, k: attention(q, k, k, causal=True), (queries(), queries()))
    with pytest.raises(RuntimeError, match=r"`q_offset` must be given.*q_len=3 and kv_len=7 differ.*MHA-POS-2"):
        graph(queries(2, 3), queries(2, 7))


def by_forward_mode(q: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(attention(forward_ad.make_dual(q, torch.ones_like(q)), q, q)).tangent


def with_gradients(q: Tensor) -> Any:
    return mha_spec_torch.attention_vjp(q, q.detach().requires_grad_(), q, q)[:3]


SHARDED: list[Any] = [
    mha_spec_torch.ring_attention,
    mha_spec_torch.all_to_all_attention,
    mha_spec_torch.sharded_kv_attention,
]
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "torch.func": (torch.func.vmap(lambda q: attention(q[None], q[None], q[None])), "`query` must not be transformed"),
    "rotary in torch.func": (
        torch.func.vmap(lambda q: rotated(q[None], torch.arange(5))),
        "`x` must not be transformed",
    ),
    "forward mode": (by_forward_mode, "`query` must not be transformed"),
    "gradients of gradients": (with_gradients, "`query` of attention_vjp"),
    "a scale of sizes": (lambda q: attention(q, q, q, scale=q.shape[3] ** -1.0), "`scale` must be a Python number"),
    "a window of sizes": (
        lambda q: attention(q, q, q, window=(q.shape[2] - 2, 0)),
        "`window` must hold integers",
    ),
    "lengths of sizes": (lambda q: attention(q, q, q, kv_lengths=[q.shape[2], 2]), "`kv_lengths` must hold integers"),
    "bounds of sizes": (
        lambda q: varlen(q[0], q[0], q[0], [0, q.shape[1]], [0, q.shape[1]]),
        "`cu_seqlens_q` must hold integers",
    ),
}
REFUSED |= {
    call.__name__: (lambda q, call=call: call(q, q, q), "`query` must not be recorded by torch.jit.trace")
    for call in SHARDED
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_trace_would_fix_is_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises((ArgumentTypeError, ArgumentValueError), match=message):
        recorded(call, (queries(),))
