"""The memory of a rank in torch, its blocks, and the order of transfer and computation; parts of ring_processes.py."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mha_spec_torch
from mha_spec.sharding import LAYOUTS
from mha_spec_torch import groups, ring

HEADS, KV_HEADS, SIZE = 8, 4, 32
LENGTH = 1024
"""The tokens of the shorter of two sequences."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations made and that are alive.

    It keeps the most bytes, and those of the largest tensor. What a kernel allocates for itself is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = self.largest = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._storages = {key: pair for key, pair in self._storages.items() if not pair[0].expired()}
        sizes = [size for _, size in self._storages.values()]
        self.most, self.largest = max(self.most, sum(sizes)), max([self.largest, *sizes])
        return result


def bytes_of_step(length: int, function: Any, **options: Any) -> tuple[int, int]:
    """Return the most bytes of a step, forward and backward, of tensors of this length, and those of the largest."""
    with LiveBytes() as live:
        query = torch.zeros(1, HEADS, length, SIZE, requires_grad=True)
        key, value = (torch.zeros(1, KV_HEADS, length, SIZE, requires_grad=True) for _ in range(2))
        function(query, key, value, causal=True, **options).sum().backward()
    return live.most, live.largest


def memory() -> dict[str, Any]:
    """Count the bytes of a step of a rank for two lengths of the sequence, and those of the step in one process."""
    ranks, ring_attention = dist.get_world_size(), mha_spec_torch.ring_attention
    lengths = LENGTH, 2 * LENGTH
    of_rank = {
        f"memory {layout}": [bytes_of_step(length // ranks, ring_attention, layout=layout) for length in lengths]
        for layout in LAYOUTS
    }
    return of_rank | {"memory whole": [bytes_of_step(length, mha_spec_torch.attention) for length in lengths]}


def hidden_rank() -> dict[str, Any]:
    """Count the blocks of a window in contiguous shards: a rank computes those of itself and of the rank before."""
    calls = [0]
    true_visit = ring.visit

    def visit(*arguments: Any) -> Any:
        for block in true_visit(*arguments):
            calls[0] += 1
            yield block

    x = torch.zeros(1, 1, 12, 3)
    with patch.object(ring, "visit", visit):
        mha_spec_torch.ring_attention(x, x, x, causal=True, window=(5, 0))
    return {"blocks": calls[0]}


def overlap() -> dict[str, Any]:
    """Note when keys are sent, have arrived, and are waited for; each block waits until the next keys have arrived.

    The keys of rank r hold r + 1. If a transfer needed `wait` to make progress, a block would wait in vain. Rank 0
    begins only when all others have begun: if `send` waited for keys, they would wait for each other, an error.
    """
    store = dist.distributed_c10d._get_default_store()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    events: list[str] = []
    travelling: list[Any] = []
    true_send, true_visit, true_wait = groups.Group.send, ring.visit, groups.Transfer.wait

    def send(group: Any, arrays: Any) -> Any:
        events.append("send")
        if rank == 0:
            store.wait([f"begun/{other}/{len(travelling)}" for other in range(1, ranks)], timedelta(seconds=20))
        transfer = true_send(group, arrays)
        store.set(f"begun/{rank}/{len(travelling)}", "")
        travelling.append(transfer)
        return transfer

    def visit(*arguments: Any) -> Any:
        for block in true_visit(*arguments):
            if len(travelling) < ranks:
                expected = (rank - len(travelling)) % ranks + 1
                events.append("arrived" if arrives(travelling[-1]._received[0], expected) else "computed")
            yield block

    def wait(transfer: Any) -> Any:
        events.append("wait")
        return true_wait(transfer)

    x = torch.full((1, 1, 64, 8), rank + 1.0)
    with (
        patch.object(groups.Group, "send", send),
        patch.object(ring, "visit", visit),
        patch.object(groups.Transfer, "wait", wait),
    ):
        mha_spec_torch.ring_attention(x, x, x)
    return {"overlap": events}


def arrives(received: torch.Tensor, number: float) -> bool:
    """Wait until a buffer holds a number everywhere, for half a minute at most."""
    deadline = time.monotonic() + 30
    while not bool((received == number).all()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True
