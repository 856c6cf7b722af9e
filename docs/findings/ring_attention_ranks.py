# /// script
# dependencies = ["beartype==0.23.1", "einops==0.8.2", "ring-attention-pytorch==0.5.20", "torch==2.13.0"]
# ///
"""ring-attention-pytorch: over several processes, `ring_flash_attn` has wrong gradients of keys and values.

The gradient of the keys of a rank is the sum of the true gradients of its keys and its values; that of its values is
this sum for the keys and values of the next rank. Shapes are right, because autograd sums over a leading axis of 2.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
from ring_attention_pytorch.ring_attention import default_attention
from ring_attention_pytorch.ring_flash_attention import ring_flash_attn
from torch.multiprocessing.spawn import spawn

RANKS, LENGTH = 2, 4


def differentiated(function, operands, grad_output):
    """Return the output and the gradients of query, key and value."""
    operands = [x.clone().requires_grad_() for x in operands]
    output = function(*operands)
    return output.detach(), *torch.autograd.grad(output, operands, grad_output)


def work(rank, folder, faults):
    """Compare the results of a rank with its part of those of one process."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    whole = torch.randn(4, 1, RANKS * LENGTH, 2, 8, generator=torch.Generator().manual_seed(0))
    *expected, key, value = differentiated(default_attention, whole[:3], whole[3])
    shard, next_shard = (slice(part * LENGTH, (part + 1) * LENGTH) for part in (rank, (rank + 1) % RANKS))

    def ring(*operands):
        return ring_flash_attn(*operands, ring_reduce_col=True, ring_size=RANKS)

    *results, of_key, of_value = differentiated(ring, whole[:3, :, shard], whole[3, :, shard])
    torch.testing.assert_close(results, [x[:, shard] for x in expected])
    differences = [float((x - y[:, shard]).abs().max()) for x, y in ((of_key, key), (of_value, value))]
    print(f"rank {rank}: the gradients of key and value differ by {differences}")
    torch.testing.assert_close(of_key, (key + value)[:, shard])
    torch.testing.assert_close(of_value, (key + value)[:, next_shard])
    faults[rank] = min(differences)


if __name__ == "__main__":
    faults = torch.zeros(RANKS).share_memory_()
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (folder, faults), RANKS)
    sys.exit(not faults.min() > 0.1)
