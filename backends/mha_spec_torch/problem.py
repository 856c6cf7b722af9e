"""A prepared call: its options in the form that every path reads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from mha_spec import steps

from .dropout import draws_of
from .masks import LARGEST_KEPT
from .tasks import FEWEST_KEYS, NOTHING_HIDDEN, dense_rows, softmax_dtype
from .visibility import Visibility, all_hold

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from mha_spec.arguments import Arguments

    from .dropout import Draws
    from .tasks import Constraint, Operands, Task

__all__ = ["Direct", "Problem", "readable"]


class Direct(NamedTuple):
    """What is known about a call that needs nothing but the flash kernel."""

    constraint: Constraint | None
    """The kernel's arguments for hidden pairs; None if the mask of each call determines them."""
    has_few_keys: bool
    """True if the kernel may take a row of NaN for one that sees no key, unless logits are added."""


class Problem(NamedTuple):
    """The options of a call, without its operands."""

    scale: float
    softcap: float | None
    dropout_rate: float
    dtype: torch.dtype
    """The softmax's type (MHA-SOFTMAX-2)."""
    visibility: Visibility
    host: bool
    """True if tensors may be read: they are on the CPU and the call is not traced."""
    suits_flash: bool
    """True if the flash kernel for the CPU has all options."""
    is_ready: bool
    """True if query, key and value are known to have contiguous rows of one size that do not overlap."""
    direct: Direct | None
    """What the kernel needs to know, if it takes the call as it is, in the softmax's type.

    Torch's gradient of the kernel is then accurate enough, too.
    """
    dropout_mask: torch.Tensor | None
    draws: Draws | None
    """The random integers of dropout, unless it has a mask."""
    cutter: Callable[[Operands, Task], Operands] | None = None
    """Selects the part of each operand that a task of a packed call reads."""

    @classmethod
    def of(cls, a: Arguments, *, host: bool) -> Problem:
        """Prepare the options of a call."""
        dtype = softmax_dtype(a.query)
        return cls(
            scale=steps.scale_of(a.scale, a.query.shape[3]),
            softcap=a.softcap,
            dropout_rate=a.dropout_rate,
            dtype=dtype,
            visibility=Visibility(a, dtype, host=host),
            host=host,
            suits_flash=host and a.softcap is None and a.dropout_mask is None and draws_of(a) is None,
            is_ready=False,
            direct=None,
            dropout_mask=a.dropout_mask,
            draws=draws_of(a),
        )

    def described(self, x: Operands) -> Problem:
        """Fill in what is known about the operands."""
        is_ready = x.query.shape[3] == x.value.shape[3] and all(dense_rows(operand) is operand for operand in x[:3])
        return self._replace(is_ready=is_ready, direct=self._direct(x) if is_ready else None)

    def _direct(self, x: Operands) -> Direct | None:
        is_plain = x.bias is None and x.sinks is None and x.query.dtype == self.dtype
        if not (self.suits_flash and is_plain and [task.is_whole for task in self.visibility.tasks] == [True]):
            return None
        constraint = self.visibility.tasks[0].constraint(self.scale)
        has_few_keys = x.key.shape[2] < FEWEST_KEYS
        if x.mask is None:
            return None if constraint is None else Direct(constraint, has_few_keys)
        # The kernel would save the logits of a large mask for its gradient, which take four or eight times its memory.
        is_alone = constraint is NOTHING_HIDDEN and x.mask.numel() <= LARGEST_KEPT
        return Direct(None, has_few_keys) if is_alone else None

    def without_kernel(self) -> Problem:
        """Return the problem for the formula."""
        return self._replace(suits_flash=False, direct=None)

    def unread(self) -> Problem:
        """Return the problem with tensors that must not be read."""
        return self.without_kernel()._replace(host=False)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The caller's tensors that both passes read.

        They are saved for the backward, so that autograd refuses a change in place between the passes.
        """
        tensors = self.visibility.unread
        return tensors if self.dropout_mask is None else (*tensors, self.dropout_mask)

    @property
    def drops(self) -> bool:
        """Tell whether the call has dropout, by a mask or by draws."""
        return self.dropout_mask is not None or self.draws is not None

    def cut(self, x: Operands, task: Task) -> Operands:
        """Select the part of each operand that a task reads."""
        if self.cutter is not None:
            return self.cutter(x, task)
        return x if task.is_whole and x.sinks is None else x.cut(task)

    def visible(self, task: Task, x: Operands) -> torch.Tensor | None:
        """Tell which pairs of a task are visible, (batch*, heads*, queries*, keys*); None stands for all.

        A bias hides the pairs for which it is -inf in the softmax's type (MHA-BIAS-2, MHA-BIAS-3).
        """
        if task.sees_all and x.bias is None:
            return x.mask
        constraints = self.visibility.constraints(task)
        if x.mask is not None:
            constraints.append(x.mask)
        if x.bias is not None:
            constraints.append(x.bias.to(self.dtype) != -math.inf)
        return all_hold(constraints)

    def keep(self, task: Task) -> torch.Tensor | None:
        """Return the factors by which dropout multiplies the weights of a task, or None (MHA-DROP-1, MHA-DROP-2)."""
        if self.draws is not None:
            kept = self.draws.kept(task, self.dropout_rate)
        elif self.dropout_mask is not None:
            kept = task.of_pairs(self.dropout_mask)
        else:
            return None
        return kept.to(self.dtype) / (1 - self.dropout_rate)

    def finite(self, *arrays: torch.Tensor) -> bool:
        """Return True if tensors may be read and have finite sums, so that all their elements are finite."""
        return self.host and all(math.isfinite(array.sum(dtype=self.dtype).item()) for array in arrays)


def readable(tensor: torch.Tensor) -> bool:
    """Tell whether to read a tensor that is not traced: reading from an accelerator would wait for it."""
    return tensor.is_cpu
