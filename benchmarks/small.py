"""Compare small calls of each backend, whose cost is mostly fixed, with those of its peer.

Run `python benchmarks/small.py numpy|torch|jax|tensorflow`; a row past its limit fails the run. Every call is in
float32 and has 8 heads of 64 unless its name gives another shape. Calls alternate with the peer's, and the times are
medians in microseconds. For a machine that other processes use, `--least` gives minima, and `--processor` gives the
processor time of all threads. `small.py torch --stages` shows what a call with a mask consists of.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy
from measure import medians, ratio
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

HEADS, SIZE = 8, 64


@dataclass(frozen=True)
class Limit:
    """The greatest time allowed: `times` that of the peer plus `more` microseconds."""

    times: float
    more: float = 0.0

    def holds(self, ours: float, peer: float) -> bool:
        """Return True if our microseconds are within the limit."""
        return ours <= self.times * peer + self.more

    def __str__(self) -> str:
        parts = [f"{self.times:.2f} x peer"] * (self.times > 0) + [f"{self.more:.0f} us"] * (self.more > 0)
        return " + ".join(parts)


@dataclass(frozen=True)
class Row:
    """A call and its peer."""

    call: str
    peer: str
    limit: Limit | None
    ours: Callable[[], object]
    theirs: Callable[[], object]


def operands(q_len: int, kv_len: int, heads: int = HEADS) -> list[numpy.ndarray]:
    """Draw query, key and value of standard normal numbers."""
    generator = numpy.random.default_rng(7)
    lengths = (q_len, kv_len, kv_len)
    return [generator.standard_normal((1, heads, length, SIZE), dtype=numpy.float32) for length in lengths]


def lower_triangle(q_len: int, kv_len: int) -> numpy.ndarray:
    """Make the causal mask whose last query sees every key, (1, 1, q_len, kv_len), True = may attend."""
    return numpy.tri(q_len, kv_len, kv_len - q_len, dtype=bool)[None, None]


def numpy_rows() -> Iterator[Row]:
    """Compare NumPy with the plain formula, and with itself without a constraint."""
    from numpy_backend import plain

    from mha_spec_numpy import attention

    for q_len, kv_len in ((1, 8), (1, 64), (64, 64)):
        limit = Limit(1.0, 60.0 if q_len == 1 else 0.0)
        q, k, v = operands(q_len, kv_len)
        mask = lower_triangle(q_len, kv_len)
        full = partial(attention, q, k, v)
        causal = partial(attention, q, k, v, causal=True, q_offset=kv_len - q_len)
        yield Row(f"{q_len} x {kv_len}", "formula", limit, full, partial(plain, q, k, v))
        yield Row(f"{q_len} x {kv_len}, causal", "formula, masked", limit, causal, partial(plain, q, k, v, mask))
    for call, length, heads, options, times in (
        ("512 x 512, causal", 512, HEADS, {"causal": True}, 1.0),
        ("(1, 4, 4096, 64), causal", 4096, 4, {"causal": True}, 1 / 1.7),
        ("(1, 4, 8192, 64), window (256, 0)", 8192, 4, {"window": (256, 0)}, 1 / 8),
    ):
        full = partial(attention, *operands(length, length, heads))
        yield Row(call, "ours in full", Limit(times), partial(full, **options), full)


def torch_rows() -> Iterator[Row]:
    """Compare PyTorch with its scaled_dot_product_attention."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from mha_spec_torch import attention

    def trained(function: Callable[..., Any], tensors: list[Any], **options: object) -> Callable[[], object]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        return lambda: torch.autograd.grad(function(*leaves, **options).sum(), leaves)

    q, k, v = map(torch.from_numpy, operands(1, 8))
    yield Row("1 x 8", "SDPA", Limit(0.0, 40.0), partial(attention, q, k, v), partial(sdpa, q, k, v))
    for q_len, kv_len, limit in ((1, 64, Limit(1.0, 25.0)), (128, 128, Limit(1.05))):
        q, k, v = map(torch.from_numpy, operands(q_len, kv_len))
        mask = torch.from_numpy(lower_triangle(q_len, kv_len))
        # The layers of a model have the same mask, whose logits are kept; a causal one needs none.
        drawn = random_masks(q_len, kv_len)
        masked = partial(sdpa, q, k, v, attn_mask=drawn[0])
        yield Row(
            f"{q_len} x {kv_len}, random mask",
            "SDPA, masked",
            limit,
            partial(attention, q, k, v, mask=drawn[0]),
            masked,
        )
        calls = (partial(attention, q, k, v), "mask"), (partial(sdpa, q, k, v), "attn_mask")
        news = (with_new_masks(function, name, drawn) for function, name in calls)
        yield Row(f"{q_len} x {kv_len}, new random mask", "SDPA, new mask", None, *news)
        theirs = partial(sdpa, q, k, v, attn_mask=mask)
        for call, options in {
            "causal mask": {"mask": mask},
            "causal": {"causal": True, "q_offset": kv_len - q_len},
            "kv_lengths": {"kv_lengths": [kv_len - 3]},
            "lse": {"return_lse": True},
        }.items():
            yield Row(
                f"{q_len} x {kv_len}, {call}", "SDPA, masked", limit, partial(attention, q, k, v, **options), theirs
            )
    for q_len, kv_len, causal in ((1, 8, False), (16, 16, False), (16, 16, True), (128, 128, False), (128, 128, True)):
        tensors = [torch.from_numpy(array) for array in operands(q_len, kv_len)]
        call = f"{q_len} x {kv_len}{', causal' if causal else ''}, forward and backward"
        ours, theirs = trained(attention, tensors, causal=causal), trained(sdpa, tensors, is_causal=causal)
        yield Row(call, "SDPA, causal" if causal else "SDPA", Limit(1.1 if q_len >= 128 else 1.5), ours, theirs)


def random_masks(q_len: int, kv_len: int) -> Any:
    """Draw more masks than PyTorch's backend keeps, (3, 1, 1, q_len, kv_len)."""
    import torch

    return torch.rand((3, 1, 1, q_len, kv_len), generator=torch.Generator().manual_seed(0)) < 0.7


def with_new_masks(function: Callable[..., Any], name: str, masks: Any) -> Callable[[], object]:
    """Return a call whose argument `name` is another mask each time."""
    following = cycle(masks)
    return lambda: function(**{name: next(following)})


def torch_stages() -> dict[str, Callable[[], object]]:
    """Build up a call of PyTorch with a random mask, 128 x 128: each function adds a stage to the one before."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from mha_spec_torch import attention

    q, k, v = map(torch.from_numpy, operands(128, 128))
    masks = random_masks(128, 128)
    mask = masks[0]
    seen, hidden = torch.tensor(0.0), torch.tensor(-torch.inf)
    logits = torch.where(mask, seen, hidden)

    def converting() -> torch.Tensor:
        return sdpa(q, k, v, attn_mask=torch.where(mask, seen, hidden))

    return {
        "SDPA with the mask": partial(sdpa, q, k, v, attn_mask=mask),
        "SDPA with logits": partial(sdpa, q, k, v, attn_mask=logits),
        "and the mask is converted": converting,
        "and a sum searches for NaN": lambda: converting().sum().item(),
        "and all of Python: attention": with_new_masks(partial(attention, q, k, v), "mask", masks),
        "with the mask of the call before": partial(attention, q, k, v, mask=mask),
    }


def jax_rows() -> Iterator[Row]:
    """Compare JAX with itself without a constraint."""
    import jax
    import jax.numpy as jnp

    from mha_spec_jax import attention

    tensors = [jnp.asarray(array) for array in operands(512, 512)]
    full, causal = jax.jit(attention), jax.jit(partial(attention, causal=True))
    ours, theirs = (lambda call=call: jax.block_until_ready(call(*tensors)) for call in (causal, full))
    yield Row("512 x 512, causal, jit", "ours in full", Limit(1.0), ours, theirs)


def tensorflow_rows() -> Iterator[Row]:
    """Compare eager TensorFlow with Keras, and TensorFlow with itself without a constraint."""
    import keras
    import tensorflow as tf

    from mha_spec_tensorflow import attention

    tensors = [tf.constant(array) for array in operands(64, 64)]
    swapped = [tf.transpose(tensor, (0, 2, 1, 3)) for tensor in tensors]
    by_keras: Any = keras.ops.dot_product_attention
    for causal in (False, True):
        ours = partial(attention, *tensors, causal=causal)
        theirs = partial(by_keras, *swapped, is_causal=causal)
        yield Row(f"64 x 64{', causal' if causal else ''}, eager", "keras.ops", Limit(1.0), ours, theirs)
    tensors = [tf.constant(array) for array in operands(512, 512)]
    for world, wrapped in (("eager", lambda call: call), ("tf.function", tf.function)):
        ours, theirs = (partial(wrapped(partial(attention, causal=causal)), *tensors) for causal in (True, False))
        yield Row(f"512 x 512, causal, {world}", "ours in full", Limit(1.0), ours, theirs)


ROWS = {"numpy": numpy_rows, "torch": torch_rows, "jax": jax_rows, "tensorflow": tensorflow_rows}


def measured(table: Table, row: Row, middle: Callable[[Iterable[float]], float], clock: Callable[[], float]) -> bool:
    """Add a row to the table; return True if it is within its limit."""
    *_, ours, peer = (milliseconds * 1000 for milliseconds in ratio(row.ours, row.theirs, 2.0, clock, middle))
    good = row.limit is None or row.limit.holds(ours, peer)
    times = (f"{ours:.0f}", f"{peer:.0f}", f"{ours - peer:+.0f}", f"{ours / peer:.2f}")
    table.add_row(
        row.call, row.peer, *times, *(("", "") if row.limit is None else (str(row.limit), "ok" if good else "EXCEEDED"))
    )
    return good


def main() -> None:
    """Print the table of the backend that the command line names."""
    if sys.argv[1:] == ["torch", "--stages"]:
        for stage, seconds in medians(torch_stages(), 20.0).items():
            print(f"{stage:32s} {seconds * 1e6:6.0f} us")
        return
    names = [name for name in sys.argv[1:] if name not in ("--least", "--processor")]
    if len(names) != 1 or names[0] not in ROWS:
        sys.exit(f"small.py: name one backend, {', '.join(ROWS)}")
    middle = min if "--least" in sys.argv else statistics.median
    clock = time.process_time if "--processor" in sys.argv else time.perf_counter
    table = Table(title=f"mha_spec_{names[0]}, small calls")
    table.add_column("call")
    table.add_column("peer")
    for heading in ("ours us", "peer us", "more us", "ours / peer", "limit", ""):
        table.add_column(heading, justify="right")
    good = [measured(table, row, middle, clock) for row in ROWS[names[0]]()]
    Console(width=140).print(table)
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
