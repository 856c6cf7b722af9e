"""`mha-spec new FILE`: write a complete target file to start from."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from mha_spec.errors import MhaSpecError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["FileExists", "write_starter"]


class FileExists(MhaSpecError):
    """The file exists and is not overwritten, or it cannot be written."""


STARTER = '''"""An attention to be judged: mha-spec check {name}

Replace the body of `attention` by a call of your implementation. The suite tests only the features that the signature
accepts: add a keyword (bias, q_offset, window, chunk, prefix_lengths, q_lengths, kv_lengths, kv_starts, q_segment_ids
and kv_segment_ids, scale, softcap, sinks, dropout_mask and dropout_rate, return_lse) to have it tested, or remove a
keyword. `mha-spec spec` lists the clauses that define each feature.
"""

import numpy

arrays = "numpy"  # the library of arguments and results: "numpy", "torch", "jax" or "tensorflow"
dtypes = ("float64", "float32")  # also "float16" and "bfloat16"
# device = "cuda"                             the device of arrays of torch, jax or tensorflow
# conventions = {{"causal_alignment": "lower_right"}}   the diagonal, if there is no q_offset
# layout = "bshd"                             (batch, length, heads, size); also "thd", packed with cu_seqlens_q and
#                                             cu_seqlens_kv, or "paged" with block_table and kv_lengths: docs/layouts.md
# groups = False                              the suite repeats keys and values for each head of the queries
# stacked = "qkv"                             a single array of query, key and value; also "kv"
# profile = "fused"                           a kernel that multiplies whole tiles and approximates tanh
# ranks, rank_layout = 4, "striped"           ranks that share the keys of a call and merge their results


def attention(query, key, value, *, mask=None, causal=False):
    """query (batch, heads, q_len, qk_dim), key and value (batch, kv_heads, kv_len, ...); mask: True = may attend."""
    batch, heads, q_len, qk_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    if causal and q_len != kv_len:
        raise NotImplementedError("causal attention of unequal lengths")  # reported as unsupported, not as a failure
    key = numpy.repeat(key, heads // kv_heads, axis=1)
    value = numpy.repeat(value, heads // kv_heads, axis=1)

    visible = numpy.ones((batch, heads, q_len, kv_len), dtype=bool)
    if mask is not None:
        visible &= mask
    if causal:
        visible &= numpy.tri(q_len, kv_len, dtype=bool)

    scores = numpy.where(visible, query @ key.swapaxes(2, 3) / qk_dim**0.5, -numpy.inf)
    largest = numpy.max(scores, axis=3, keepdims=True, initial=-numpy.inf)
    weights = numpy.exp(scores - numpy.where(largest == -numpy.inf, 0, largest))
    total = numpy.sum(weights, axis=3, keepdims=True)
    weights = weights / numpy.where(total == 0, 1, total)  # a row that sees no key gives 0

    # 0 * NaN is NaN: a NaN in a value must reach the rows that see it, and no other row
    output = weights @ numpy.where(numpy.isfinite(value), value, 0)
    seen = visible.astype(query.dtype) @ (~numpy.isfinite(value)).astype(query.dtype)
    return numpy.where(seen > 0, numpy.nan, output).astype(query.dtype)
'''


def write_starter(path: Path) -> None:
    """Write the starter to a new file.

    Raises:
        FileExists: The file exists or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(STARTER.format(name=_in_docstring(path)))
    except FileExistsError as error:
        raise FileExists(f"{path} already exists; choose another name") from error
    except OSError as error:
        raise FileExists(f"{path} cannot be written: {error.strerror}") from error


def _in_docstring(path: Path) -> str:
    """Return the name as an argument of a shell, with all characters escaped that would end or change a docstring."""
    escaped = shlex.quote(str(path)).replace("\\", "\\\\").replace('"', '\\"')
    return escaped.encode("utf-8", "backslashreplace").decode()
