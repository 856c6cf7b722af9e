# /// script
# dependencies = ["torch==2.13.0"]
# ///
"""PyTorch: the output of `nn.MultiheadAttention` for a query that sees no key depends on the path that it takes."""

import sys

import torch

layer = torch.nn.MultiheadAttention(8, 2, batch_first=True)
x, hidden = torch.randn(1, 3, 8), torch.ones(1, 3, dtype=torch.bool)
outputs = {}
for name, training, need_weights in (
    ("evaluation", False, False),
    ("evaluation, with weights", False, True),
    ("training", True, False),
    ("training, with weights", True, True),
):
    layer.train(training)
    with torch.no_grad():
        output = layer(x, x, x, key_padding_mask=hidden, need_weights=need_weights)[0]
    outputs[name] = output
    print(f"{name}: {output[0, 0, :3].tolist()}")
finite = {name: bool(output.isfinite().all()) for name, output in outputs.items()}
sys.exit(len(set(finite.values())) == 1)
