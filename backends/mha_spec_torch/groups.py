"""Communication between the ranks of a process group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from mha_spec.errors import refuse_type, refuse_value
from mha_spec.scalars import short_repr

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    _Map = Callable[[Tensor], Tensor]

__all__ = ["Group", "Transfer", "attached", "exchanged", "shared", "summed"]


class Transfer:
    """Tensors on their way to the next rank, and those of the rank before."""

    def __init__(self, sent: Sequence[Tensor], works: Sequence[Any], received: tuple[Tensor, ...]) -> None:
        """Keep the sent tensors until they have arrived."""
        self._sent, self._works, self._received = sent, works, received

    def wait(self) -> tuple[Tensor, ...]:
        """Wait until the tensors of the rank before are here; after the timeout of the group, this is an error."""
        for work in self._works:
            work.wait()
        return self._received


class Group(NamedTuple):
    """A process group, and the place of this process in it."""

    handle: Any
    rank: int
    ranks: int

    @classmethod
    def of(cls, group: Any) -> Group:
        """Check a group; None is the default group of torch.distributed."""
        received = f"received group={short_repr(group)}"
        if not dist.is_available() or not dist.is_initialized():
            refuse_value(
                "MHA-SHARD-1",
                f"`group` must be a process group, {received} before torch.distributed.init_process_group was called.",
            )
        if group is not None and not isinstance(group, dist.ProcessGroup):
            refuse_type(
                "MHA-SHARD-1",
                "`group` must be a torch.distributed.ProcessGroup of which this process is a member, or None for the "
                f"default group, {received}. The group of an axis of a DeviceMesh is mesh.get_group(axis).",
            )
        handle = dist.group.WORLD if group is None else group
        rank = dist.get_rank(handle)
        if rank < 0:
            refuse_value("MHA-SHARD-1", f"`group` must have this process as a member, {received}.")
        return cls(handle, rank, dist.get_world_size(handle))

    def send(self, tensors: Sequence[Tensor]) -> Transfer:
        """Begin to send tensors to the next rank, and to receive as many of the same sizes from the rank before."""
        sent = [tensor.contiguous() for tensor in tensors]
        received = tuple(torch.empty_like(tensor) for tensor in sent)
        following, preceding = (dist.get_global_rank(self.handle, (self.rank + step) % self.ranks) for step in (1, -1))
        operations = []
        for tensor, space in zip(sent, received, strict=True):
            if tensor.numel():
                operations.append(dist.P2POp(dist.isend, _bytes(tensor), following, self.handle))
                operations.append(dist.P2POp(dist.irecv, _bytes(space), preceding, self.handle))
        return Transfer(sent, dist.batch_isend_irecv(operations) if operations else (), received)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks."""
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.handle)
        return total

    def maximum(self, tensor: Tensor) -> Tensor:
        """Return the maximum over the ranks."""
        most = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.handle)
        return most

    def exchange(self, tensor: Tensor) -> Tensor:
        """Send the part r of axis 0 to rank r, and return the parts that the ranks sent, in their order."""
        sent = tensor.detach().contiguous()
        received = torch.empty_like(sent)
        if sent.numel():
            dist.all_to_all_single(_bytes(received), _bytes(sent), group=self.handle)
        return received

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, along a new axis 0."""
        sent = tensor.detach().contiguous()
        received = sent.new_empty((self.ranks, *sent.shape))
        if sent.numel():
            dist.all_gather([_bytes(part) for part in received], _bytes(sent), group=self.handle)
        return received


def _bytes(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as bytes, because not every library of communication has every dtype."""
    return tensor.detach().view(-1).view(torch.uint8)


class _Linear(torch.autograd.Function):
    """A linear map of the tensors of all ranks, whose gradient is its transpose, which is linear again."""

    @staticmethod
    def forward(ctx: Any, linear: _Map, transpose: _Map, tensor: Tensor) -> Tensor:
        ctx.maps = transpose, linear
        return linear(tensor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[None, None, Tensor]:
        return None, None, _Linear.apply(*ctx.maps, grad_outputs[0])


def _identity(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor)


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *sources: Tensor) -> Tensor:
        ctx.save_for_backward(*sources)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, ...]:
        return *grad_outputs, *map(torch.zeros_like, ctx.saved_tensors)


def attached(tensor: Tensor, *sources: Tensor) -> Tensor:
    """Return a tensor whose gradient reaches the sources, as zeros, also where it was computed without them.

    A rank whose keys are all hidden must take part in the sums of the backward pass, too.
    """
    return _Attached.apply(tensor, *sources)


def exchanged(group: Group, tensor: Tensor) -> Tensor:
    """Exchange the parts of axis 0; the gradient is exchanged back."""
    return _Linear.apply(group.exchange, group.exchange, tensor)


def summed(group: Group, tensor: Tensor) -> Tensor:
    """Return the sum over the ranks; every rank has the gradient of the sum already."""
    return _Linear.apply(group.sum, _identity, tensor)


def shared(group: Group, tensor: Tensor) -> Tensor:
    """Return a tensor that every rank holds; its gradient is the sum over the ranks (MHA-SHARD-4)."""
    return _Linear.apply(_identity, group.sum, tensor)
