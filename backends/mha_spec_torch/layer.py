"""The layer for PyTorch: the steps of the specification, by operations of torch and the attention of this package."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from mha_spec import layer_checks, layer_steps
from mha_spec.arguments import decorate_method
from mha_spec.array_checks import is_mapping
from mha_spec.arrays import dtype_name, host_integers, library_of, softmax_dtype_name
from mha_spec.cache import KVCache, PagedKVCache
from mha_spec.layer import Layer
from mha_spec.layer_steps import LayerSteps, slope_values
from mha_spec.scalars import plain

from .cache_steps import (
    append,
    append_paged,
    bounds,
    empty,
    integers,
    new_lengths,
    store,
    store_pages,
    store_wrapped,
    unroll,
)
from .core import attention, attention_and_weights, attention_weights
from .distributed import replicated
from .function import check_tensor
from .host import in_graph, on_device
from .paths import autocasts
from .symbols import entries, example, example_of_size, in_jit_trace, is_open, traced
from .varlen import varlen_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from jaxtyping import Float, Int

    from mha_spec.cache import AnyCache, Cache
    from mha_spec.layer_checks import LayerArguments

    Integers = Tensor | Sequence[int]

__all__ = [
    "alibi_bias",
    "alibi_slopes",
    "append_cache",
    "empty_cache",
    "multi_head_attention",
    "multi_head_attention_and_weights",
    "multi_head_attention_weights",
    "rotary_embedding",
]

_Method = TypeVar("_Method", bound="Callable[..., Any]")


def check(a: LayerArguments) -> LayerArguments:
    """Run the shared checks; under autocast every tensor is cast first, as in torch's layers."""
    check_tensor(a.query)
    if autocasts(a.query.device.type):
        operands = a.query, a.key, a.value
        # Operands that were the same tensor must stay the same tensor.
        a.query, *cast = (_autocast(operand) for operand in operands)
        a.key, a.value = (a.query if x is operands[0] else y for x, y in zip(operands[1:], cast, strict=True))
        if isinstance(a.params, dict):
            a.params = {name: _autocast(parameter) for name, parameter in a.params.items()}
    options = a.options
    a.options = example(options)
    layer_checks.check(a)
    a.options = options if is_open(options) else a.options
    return a


def check_alibi(slopes: object, q_len: int, kv_len: int, offset: Integers | int | None) -> None:
    """Run the shared check, with examples for the numbers that a tracer left open."""
    q_len, kv_len = map(example_of_size, (q_len, kv_len))
    layer_checks.check_alibi(slopes, *example((q_len, kv_len, offset)))


def _autocast(x: Any) -> Any:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def project_in(a: LayerArguments, _: LayerSteps) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Project query, key and value, each by a single matrix product with its bias (MHA-PROJ-1, MHA-PROJ-2)."""
    key, value = (
        None if x is None else _split(x, a.params[f"w_{name}"], a.params.get(f"b_{name}"))
        for name, x in (("k", a.key), ("v", a.value))
    )
    return _split(a.query, a.params["w_q"], a.params.get("b_q")), key, value


def _split(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    (batch, length, embed), (_, heads, size) = x.shape, weight.shape
    return _linear(x, embed, weight, bias, (batch, length, heads, size)).transpose(1, 2)


def _linear(x: Tensor, size: int, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Multiply the vectors of `size` numbers in x by a matrix (in, out), add the bias, and reshape the result.

    `torch.nn.functional.linear` is not used because it needs the transposed matrix, with which it is slower.
    """
    count = shape[0] * shape[1]
    if _few(x, count, size, weight):
        product = _in_parts(x, count, size, weight).reshape(shape)
        return product if bias is None else product + bias
    rows, matrix = x.reshape(count, size), weight.reshape(size, -1)
    product = rows @ matrix if bias is None else torch.addmm(bias.reshape(-1), rows, matrix)
    return product.reshape(shape)


FEW_ROWS, PARTS = 16, 8
LEAST = 2**16
"""On the CPU, a product of at most `FEW_ROWS` rows and a matrix of `LEAST` numbers or more is limited by reading the
matrix, which a single core does unless the product is cut into `PARTS` parts."""


def _few(x: Tensor, count: int, size: int, weight: Tensor) -> bool:
    """Tell whether a product of `count` rows is faster in parts; 16-bit types would round the sums of the parts."""
    if not x.is_cpu or traced(x) or count > FEW_ROWS:
        return False
    return x.dtype in (torch.float32, torch.float64) and size % PARTS == 0 and weight.numel() >= LEAST


def _in_parts(x: Tensor, count: int, size: int, weight: Tensor) -> Tensor:
    """Compute a product as a sum of products, each with a share of the rows of the matrix."""
    share = size // PARTS
    parts = x.reshape(count, PARTS, share).transpose(0, 1)
    return torch.bmm(parts, weight.reshape(PARTS, share, -1)).sum(0)


def normalise(x: Tensor, gain: Tensor | None, epsilon: float) -> Tensor:
    """Divide each head's vector by its root mean square, in the softmax's type (MHA-NORM-1)."""
    if gain is None:
        return x
    dtype = _wide(x)
    return rms_norm(x.to(dtype), gain.shape, gain.to(dtype), epsilon).to(x.dtype)


def normalise_jointly(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """Divide the vectors of all heads of a token by their common root mean square (MHA-NORM-3)."""
    return normalise(x.transpose(1, 2), gain, epsilon).transpose(1, 2)


def _wide(x: Tensor) -> torch.dtype:
    return getattr(torch, softmax_dtype_name(dtype_name(x)))


def positions(offset: Integers | int, length: int, like: Tensor) -> Tensor:
    """Return offset[b] + i for token i of batch entry b: (length,) or (batch, length) (MHA-POS-1, MHA-ROTARY-4)."""
    if isinstance(offset, (int, torch.SymInt)):
        return torch.arange(offset, offset + length, device=like.device)
    starts = on_device(offset, like.device).to(torch.int64)
    return starts[..., None] + torch.arange(length, device=like.device)


def turns(
    positions: Tensor | Sequence[float], frequencies: numpy.ndarray | Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of position * frequency, computed in float64 if the device has it (MHA-ROTARY-5)."""
    device, dtype = like.device, _wide(like)
    wide = dtype if device.type == "mps" else torch.float64
    # In float64 a sequence may hold integers of any size.
    numbers = positions if library_of(positions) else numpy.asarray(positions, dtype=numpy.float64)
    places, rates = (on_device(factor, device).to(wide) for factor in (numbers, frequencies))
    angles = layer_steps.for_each_pair(places) * rates
    angles = angles[:, None] if angles.ndim == 3 else angles
    return replicated(angles.cos().to(dtype), like), replicated(angles.sin().to(dtype), like)


def frequencies(base: float, rotary_dim: Any) -> Any:
    """Return the angle by which each pair turns from a position to the next, for the size of the heads as traced.

    torch.jit.trace has the size in a tensor, and then computes them again for each size.
    """
    if library_of(rotary_dim) is None:
        return layer_steps.frequencies(base, _fixed(rotary_dim))
    return float(base) ** (torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=rotary_dim.device) / -rotary_dim)


def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    """Attend to a cache, without its free slots if all batch entries have the same length."""
    length = _common_length(query, key, options)
    if length is not None:
        key, value = key[:, :, :length], value[:, :, :length]
        options = _remaining(query, length, options)
    return attention(query, key, value, **options)


def attend_and_weigh(query: Tensor, key: Tensor, value: Tensor, _: LayerSteps, **options: Any) -> tuple[Tensor, Tensor]:
    """Compute output and weights over all slots of a cache (MHA-LAYER-4)."""
    return attention_and_weights(query, key, value, **options)


OF_KEYS = {"mask", "bias", "dropout_mask", "kv_segment_ids"}
"""The options that have an axis for keys."""

INDICES = ("kv_starts", "prefix_lengths")
"""The options that have an index of a key for each batch entry."""


def _common_length(query: Tensor, key: Tensor, options: dict[str, Any]) -> int | None:
    """Return the length of all entries of a cache; None if the host does not know it, or an option covers all slots."""
    lengths, offset = options.get("kv_lengths"), options.get("q_offset")
    if not isinstance(lengths, numpy.ndarray) or not isinstance(offset, numpy.ndarray) or OF_KEYS & options.keys():
        return None
    numbers = lengths.tolist()
    if lengths.shape != (query.shape[0],) or lengths.dtype.kind != "i" or len(set(numbers)) != 1:
        return None
    indices = [number for name in INDICES if name in options for number in host_integers(options[name]) or ()]
    return numbers[0] if all(0 <= number <= key.shape[2] for number in (numbers[0], *indices)) else None


def _remaining(query: Tensor, length: int, options: dict[str, Any]) -> dict[str, Any]:
    """Drop options without effect on keys of a common length: a single query after all keys sees them all.

    An index past all keys acts as their number: a start there hides them all, and a prefix has them all (MHA-LEN-5).
    """
    names = options.keys() - {"kv_lengths"}
    causal = options.get("causal", False)
    sees_all = causal is False or (
        causal is True and query.shape[2] == 1 and min(options["q_offset"].tolist()) >= length - 1
    )
    if sees_all and names <= {"q_offset", "causal", "scale"}:
        names &= {"scale"}
    kept = {name: options[name] for name in names}
    for name in INDICES:
        if name in kept and (numbers := host_integers(kept[name])) is not None:
            kept[name] = [min(number, length) for number in numbers]
    return kept


def project_out(x: Tensor, params: Mapping[str, Tensor], _: LayerSteps) -> Tensor:
    """Project the concatenated heads by a single matrix product with its bias (MHA-PROJ-3)."""
    batch, heads, length, size = x.shape
    weight = params["w_o"]
    return _linear(x.transpose(1, 2), heads * size, weight, params.get("b_o"), (batch, length, weight.shape[2]))


def slopes(heads: int, dtype: str) -> Tensor:
    """Return the slopes of all heads (MHA-ALIBI-1)."""
    return torch.tensor(slope_values(heads), dtype=getattr(torch, dtype))


def distances(offset: Integers | int, q_len: int, kv_len: int, like: Tensor, _: LayerSteps) -> Tensor:
    """Return |p - j|, (q_len, kv_len) or (batch, 1, q_len, kv_len) (MHA-ALIBI-2)."""
    apart = (positions(offset, q_len, like)[..., None] - torch.arange(kv_len, device=like.device)).abs()
    return apart[:, None] if apart.ndim == 3 else apart


_LAYER = Layer(
    LayerSteps(
        check=check,
        check_library=check_tensor,
        check_alibi=check_alibi,
        project_in=project_in,
        normalise=normalise,
        normalise_jointly=normalise_jointly,
        positions=positions,
        frequencies=frequencies,
        turns=turns,
        store=store,
        empty_cache=empty,
        new_lengths=new_lengths,
        append=append,
        attend=attend,
        weigh=attention_weights,
        attend_and_weigh=attend_and_weigh,
        project_out=project_out,
        slopes=slopes,
        distances=distances,
        append_paged=append_paged,
        store_pages=store_pages,
        integers=integers,
        store_wrapped=store_wrapped,
        unroll=unroll,
        bounds=bounds,
        varlen=varlen_attention,
    )
)


def _in_single_node(method: _Method) -> _Method:
    """Call a method of the layer; in a compiled graph the call is a single node."""
    name = method.__name__

    @wraps(method)
    def function(*operands: Any, cache: AnyCache | None = None, **keywords: Any) -> Any:
        if torch.compiler.is_compiling():
            query = operands[0] if operands else keywords["query"]
            operands = tuple(map(_with_these_names, operands))
            keywords = {keyword: _with_these_names(value) for keyword, value in keywords.items()}
            return _in_graph(name, operands, _unread(cache), in_graph(keywords, query))
        return method(*operands, cache=cache, **keywords)

    return cast("_Method", function)


def _with_these_names(value: Any) -> Any:
    """Return a traced copy of a mapping; the tracer guards the names of what it copies, but not of a node's operands.

    A program that was compiled without a bias would otherwise serve a call with a bias.
    """
    return dict(value) if is_mapping(value) else value


@torch.compiler.allow_in_graph
def _in_graph(name: str, operands: tuple[Any, ...], cache: AnyCache | None, keywords: dict[str, Any]) -> Any:
    query = operands[0] if operands else keywords["query"]
    keywords = {keyword: _in_tensor(keyword, value, query) for keyword, value in keywords.items()}
    settings = {keyword: _fixed(keywords[keyword]) for keyword in ("rotary", "norm_epsilon") if keyword in keywords}
    return getattr(_LAYER, name)(*operands, cache=cache, **keywords | settings)


multi_head_attention = decorate_method(_in_single_node, _LAYER.multi_head_attention)
multi_head_attention_and_weights = decorate_method(_in_single_node, _LAYER.multi_head_attention_and_weights)
multi_head_attention_weights = decorate_method(_in_single_node, _LAYER.multi_head_attention_weights)


def empty_cache(
    batch: int, kv_heads: int, capacity: int, qk_dim: int, v_dim: int | None = None, *, like: Tensor
) -> KVCache:
    """Make a cache without tokens; see `mha_spec.reference.empty_cache`."""
    check_tensor(like, "like")
    sizes = batch, kv_heads, capacity, qk_dim, v_dim
    if in_jit_trace():
        return _empty_of_open_sizes(sizes, like)
    if not torch.compiler.is_compiling():
        return _LAYER.empty_cache(*sizes, like=like)
    return KVCache(*_buffers(sizes, like), torch.zeros(batch, dtype=torch.int32, device=like.device))


def _empty_of_open_sizes(sizes: tuple[Any, ...], like: Tensor) -> KVCache:
    """Make a cache in a trace of torch.jit, whose sizes may be those of tensors."""
    layer_checks.check_like(like)
    layer_checks.empty_shapes(*map(example_of_size, sizes))
    batch, kv_heads, capacity, qk_dim, v_dim = map(plain, sizes)
    shapes = ((batch, kv_heads, capacity, size) for size in (qk_dim, qk_dim if v_dim is None else v_dim))
    return empty(tuple(shapes), like)


@torch.compiler.allow_in_graph
def _buffers(sizes: tuple[Any, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    return _LAYER.empty_cache(*sizes, like=like)[:2]


def _in_tensor(name: str, value: Any, query: Tensor) -> Any:
    """Convert a sequence of lengths or offsets that holds symbols to a tensor, because tensors are not read."""
    return entries(value, query.device) if name in PER_ENTRY and is_open(value) else value


PER_ENTRY = {"q_offset", "prefix_lengths", "q_lengths", "kv_lengths", "kv_starts"}
"""The options that may be sequences with an integer for each batch entry."""


def rotary_embedding(
    x: Float[Tensor, "batch heads length size"],
    positions: Tensor | Sequence[float],
    *,
    base: float = 10000.0,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    frequencies: Tensor | numpy.ndarray | Sequence[float] | None = None,
    attention_factor: float = 1.0,
    sections: Sequence[int] | None = None,
) -> Float[Tensor, "batch heads length size"]:
    """Rotate vectors by their positions; see `mha_spec.reference.rotary_embedding`."""
    rotary = {"base": base, "interleaved": interleaved, "rotary_dim": rotary_dim}
    rotary |= {"frequencies": frequencies, "attention_factor": attention_factor, "sections": sections}
    return _rotated(x, positions, rotary)


@torch.compiler.allow_in_graph
def _rotated(x: Tensor, positions: Tensor | Sequence[float], rotary: dict[str, Any]) -> Tensor:
    return _LAYER.rotary_embedding(x, positions, **_fixed(rotary))


def alibi_slopes(heads: int, *, dtype: str = "float32") -> Float[Tensor, "heads"]:
    """Return the slopes of linear biases; see `mha_spec.reference.alibi_slopes`."""
    return _slopes(heads, dtype)


@torch.compiler.allow_in_graph
def _slopes(heads: int, dtype: str) -> Tensor:
    return _LAYER.alibi_slopes(_fixed(heads), dtype=dtype)


def alibi_bias(
    slopes: Float[Tensor, "heads"] | int,
    q_len: int,
    kv_len: int,
    *,
    q_offset: Int[Tensor, "batch"] | Sequence[int] | int | None = None,
) -> Float[Tensor, "batch* heads q_len kv_len"]:
    """Return a bias that is linear in the distance; see `mha_spec.reference.alibi_bias`."""
    return _biased(slopes, q_len, kv_len, q_offset)


@torch.compiler.allow_in_graph
def _biased(slopes: Tensor | int, q_len: int, kv_len: int, q_offset: Integers | int | None) -> Tensor:
    if is_open(q_offset):
        q_offset = entries(q_offset, slopes.device if isinstance(slopes, Tensor) else torch.get_default_device())
    return _LAYER.alibi_bias(_fixed(slopes), q_len, kv_len, q_offset=q_offset)


def append_cache(
    cache: Cache,
    key: Float[Tensor, "batch kv_heads length qk_dim"],
    value: Float[Tensor, "batch kv_heads length v_dim"],
    lengths: Int[Tensor, "batch"] | Sequence[int] | None = None,
) -> Cache:
    """Append tokens to a cache; see `mha_spec.reference.append_cache`."""
    unread: Any = _unread(cache) or cache
    return _appended(unread, key, value, lengths)


@torch.compiler.allow_in_graph
def _appended(cache: Cache, key: Tensor, value: Tensor, lengths: Integers | None) -> Cache:
    return _LAYER.append_cache(cache, key, value, lengths)


def _unread(cache: Any) -> Any:
    """Convert lengths to a tensor in a compiled graph: other lengths on the host would compile a new graph."""
    if cache is None or not torch.compiler.is_compiling():
        return cache
    if isinstance(cache, PagedKVCache):
        cache = cache._replace(block_table=in_graph(cache.block_table, cache.key))
    if isinstance(cache.lengths, torch.Tensor):
        return cache
    return cache._replace(lengths=torch.as_tensor(cache.lengths, device=cache.key.device))


def _fixed(setting: Any) -> Any:
    """Fix the symbols in settings at their values, because other settings make another layer."""
    if isinstance(setting, dict):
        return {name: _fixed(value) for name, value in setting.items()}
    if isinstance(setting, (list, tuple)):
        return [_fixed(value) for value in setting]
    if isinstance(setting, torch.SymFloat):
        return float(setting)
    return int(setting) if isinstance(setting, torch.SymInt) else setting
