"""Random dropout: the mask that a generator gives."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mha_spec.errors import ArgumentTypeError

if TYPE_CHECKING:
    from mha_spec.arguments import Arguments

__all__ = ["drawn"]


def drawn(a: Arguments) -> Arguments:
    """Draw the mask of a call that asks for dropout and gives none, one byte for each score (MHA-DROP-4)."""
    if a.dropout_rate == 0 or a.dropout_mask is not None:
        return a
    if a.dropout_key is not None and not isinstance(a.dropout_key, torch.Generator):
        received = f"received dropout_key={a.dropout_key!r} of type {type(a.dropout_key).__name__}"
        raise ArgumentTypeError(
            f"`dropout_key` must be a torch.Generator, {received}. None is torch's own. [MHA-DROP-4]"
        )
    shape = (a.batch, a.heads, a.q_len, a.kv_len)
    mask = torch.empty(shape, dtype=torch.bool, device=a.query.device)
    return replace(a, dropout_mask=mask.bernoulli_(1 - a.dropout_rate, generator=a.dropout_key))
