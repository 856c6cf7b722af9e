"""The two orders of the pairs that a rotary embedding turns, and the conversion of params between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mha_spec.errors import ArgumentValueError
from mha_spec.parameters import AXES, REQUIRED
from mha_spec.rotary_checks import check_rotary_dim

from .names import Expected
from .operations import Operations, mapping_of, operations_of, shape_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mha_spec.arrays import Array

__all__ = ["half_split_pairs", "interleaved_pairs"]

_ROTATED = ("w_q", "w_k", "b_q", "b_k", "q_norm", "k_norm", "q_joint_norm", "k_joint_norm")


def half_split_pairs(params: Mapping[str, Array], *, rotary_dim: int | None = None) -> dict[str, Array]:
    """Make params for pairs (i, i + rotary_dim/2) from params for pairs (2i, 2i + 1).

    Queries and keys are reordered in the same way, so that with `rotary={}` the layer gives the result that it gave
    with `rotary={"interleaved": True}`. Meta's Llama has interleaved pairs, Hugging Face's half-split pairs.

    Args:
        params: As load_weights gives them; the weights, biases and norms of query and key are reordered along qk_dim.
        rotary_dim: The number of components of each head that turn; None is all of qk_dim.

    Raises:
        ArgumentValueError: rotary_dim, or qk_dim without it, is odd or out of range; a name is missing or unknown.
        ArgumentTypeError: A value is not an array.
    """
    return _reordered(params, rotary_dim, to_halves=True)


def interleaved_pairs(params: Mapping[str, Array], *, rotary_dim: int | None = None) -> dict[str, Array]:
    """Make params for pairs (2i, 2i + 1) from params for pairs (i, i + rotary_dim/2); see `half_split_pairs`."""
    return _reordered(params, rotary_dim, to_halves=False)


def _reordered(params: Mapping[str, Array], rotary_dim: int | None, *, to_halves: bool) -> dict[str, Array]:
    expected = Expected(AXES, [(name,) for name in AXES if name not in REQUIRED])
    if not expected.fits(mapping_of(params, "params")):
        expected.refuse(params, "`params` must hold the params of multi_head_attention.")
    operations = operations_of(params, "params")
    return {
        name: _reorder(name, array, rotary_dim, operations, to_halves=to_halves) if name in _ROTATED else array
        for name, array in params.items()
    }


def _reorder(name: str, array: Array, rotary_dim: int | None, operations: Operations, *, to_halves: bool) -> Array:
    shape = shape_of(array)
    if len(shape) != len(AXES[name]):
        raise ArgumentValueError(f"`{name}` must have shape=({', '.join(AXES[name])}), received shape={shape}.")
    turned = check_rotary_dim(rotary_dim, shape[-1]) or shape[-1]
    pairs = (turned // 2, 2) if to_halves else (2, turned // 2)
    last = len(shape) - 1
    first = operations.reshape(array[..., :turned], (*shape[:-1], *pairs))
    first = operations.transpose(first, (*range(last), last + 1, last))
    first = operations.reshape(first, (*shape[:-1], turned))
    return first if turned == shape[-1] else operations.join([first, array[..., turned:]], axis=last)
