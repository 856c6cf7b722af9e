"""`mha-spec new FILE`: a target file to start from, which runs as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mha_spec.errors import MhaSpecError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["FileExists", "write_starter"]


class FileExists(MhaSpecError):
    """The file exists; it is not overwritten."""


STARTER = '''"""An attention to be judged: mha-spec check {name}

Replace the body of `attention` by a call of yours. What it takes is what it is asked: add a keyword to be asked that
feature (bias, q_offset, window, q_lengths, kv_lengths, q_segment_ids and kv_segment_ids, scale, softcap, sinks,
dropout_mask and dropout_rate, return_lse), remove one not to be. `mha-spec spec` says what each of them means.
"""

import numpy

arrays = "numpy"  # the library of what comes in and goes out: "numpy", "torch", "jax" or "tensorflow"
dtypes = ("float64", "float32")  # also "float16" and "bfloat16"
# device = "cuda"                             where arrays of torch, jax or tensorflow are put
# conventions = {{"causal_alignment": "lower_right"}}   where lengths differ and there is no q_offset to say it


def attention(query, key, value, *, mask=None, causal=False):
    """query (batch, heads, q_len, qk_dim), key and value (batch, kv_heads, kv_len, ...); mask: True = may attend."""
    batch, heads, q_len, qk_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    if causal and q_len != kv_len:
        raise NotImplementedError("causal attention of unequal lengths")  # `unsupported`: it counts neither way
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

    # 0 * NaN is NaN: what a value holds that a row does not see must not reach it, what it sees must
    output = weights @ numpy.where(numpy.isfinite(value), value, 0)
    seen = visible.astype(query.dtype) @ (~numpy.isfinite(value)).astype(query.dtype)
    return numpy.where(seen > 0, numpy.nan, output).astype(query.dtype)
'''


def write_starter(path: Path) -> None:
    """Write the starter to a file that does not exist yet.

    Raises:
        FileExists: The file exists or cannot be written.
    """
    try:
        with path.open("x") as file:
            file.write(STARTER.format(name=path))
    except FileExistsError as error:
        raise FileExists(f"{path} exists already; name another file") from error
    except OSError as error:
        raise FileExists(f"{path} cannot be written: {error.strerror}") from error
