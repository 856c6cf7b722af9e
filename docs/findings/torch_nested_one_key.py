# /// script
# dependencies = ["torch==2.13.0"]
# ///
"""PyTorch: SDPA of nested tensors fails if one sequence has no keys and no other has more than one."""

import sys
import warnings

import torch

warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")


def nested(*lengths):
    """Return a nested tensor of (batch, heads, ragged length, size)."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    values = torch.randn(sum(lengths), 2, 8)
    return torch.nested.nested_tensor_from_jagged(values, offsets).transpose(1, 2)


failures = {}
for kv_lengths in ((0, 3), (0, 2), (0, 1), (1, 1)):
    key = nested(*kv_lengths)
    try:
        output = torch.nn.functional.scaled_dot_product_attention(nested(1, 1), key, key)
        print(kv_lengths, "output of (tokens, heads, size)", tuple(output.transpose(1, 2).values().shape))
    except RuntimeError as error:
        failures[kv_lengths] = str(error)
        print(kv_lengths, "RuntimeError:", error)
sys.exit(list(failures) != [(0, 1)])
