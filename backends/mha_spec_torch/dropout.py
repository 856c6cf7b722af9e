"""Random dropout: numbers are drawn for each row and each key, and a hash of both decides about their pair.

The decision does not depend on the block in which the pair is computed, so that the backward has the same mask as the
forward, and no mask is stored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mha_spec.errors import ArgumentTypeError, ArgumentValueError
from mha_spec.scalars import short_repr

if TYPE_CHECKING:
    from mha_spec.arguments import Arguments

    from .tasks import Task

__all__ = ["Draws", "drawn", "draws_of"]

MULTIPLIERS = 0x7FEB352D, -0x7B935975
"""The multipliers of Wellons' hash `lowbias32`, the second as a signed number."""


class Draws(NamedTuple):
    """Two random 32-bit integers of each row, (batch, heads, q_len, 2), and of each key, (kv_len, 2)."""

    rows: torch.Tensor
    keys: torch.Tensor

    def kept(self, task: Task, rate: float) -> torch.Tensor:
        """Tell which pairs of a task are kept: their hash is not in the lowest share `rate` of all integers."""
        rows, keys = task.of_rows(self.rows), self.keys[task.keys.start : task.keys.stop].mT
        mixed = rows[..., :1] ^ keys[0]
        mixed *= MULTIPLIERS[0]
        mixed ^= (mixed >> 15) & 0x1FFFF
        mixed ^= rows[..., 1:]
        mixed ^= keys[1]
        mixed *= MULTIPLIERS[1]
        return mixed >= min(round(rate * 2**32), 2**32 - 1) - 2**31


def drawn(a: Arguments) -> Arguments:
    """Replace `dropout_key` by draws if a call has dropout without a mask (MHA-DROP-4)."""
    if a.dropout_rate == 0 or a.dropout_mask is not None:
        return a
    generator = _generator(a)
    # randint with the argument `generator`, even None, accepts no size that a tracer left open.
    options: dict[str, Any] = {} if generator is None else {"generator": generator}
    shapes = (a.batch, a.heads, a.q_len, 2), (a.kv_len, 2)
    try:
        draws = [
            torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=a.query.device, **options)
            for shape in shapes
        ]
    except RuntimeError as error:
        if "randomness" not in str(error):
            raise
        raise ArgumentValueError(
            f"`dropout_rate` must be 0 under torch.func.vmap, received dropout_rate={a.dropout_rate}, unless "
            "that is called with randomness='different' or randomness='same'. [MHA-DROP-4]"
        ) from error
    return replace(a, dropout_key=Draws(*draws))


def draws_of(a: Arguments) -> Draws | None:
    """Return the draws by which `drawn` replaced the key, if any."""
    return a.dropout_key if isinstance(a.dropout_key, Draws) else None


def _generator(a: Arguments) -> torch.Generator | None:
    generator = a.dropout_key
    if generator is None:
        return None
    if not isinstance(generator, torch.Generator):
        received = f"received dropout_key={short_repr(generator)} of type {type(generator).__name__}"
        raise ArgumentTypeError(
            f"`dropout_key` must be a torch.Generator, {received}. None is torch's own. [MHA-DROP-4]"
        )
    if generator.device.type != a.query.device.type:
        raise ArgumentValueError(
            f"`dropout_key` must be a generator on the device of `query`, device={a.query.device}, "
            f"received device={generator.device}. [MHA-DROP-4]"
        )
    return generator
