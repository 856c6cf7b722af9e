# /// script
# dependencies = ["torch==2.13.0"]
# ///
"""PyTorch: on a CPU, `torch.compile(flex_attention)` corrupts the heap if `score_mod` indexes a tensor step by step."""

import subprocess
import sys

PROGRAM = """
import torch
from torch.nn.attention.flex_attention import flex_attention
torch.manual_seed(0)
query, key, value = torch.randn(3, 1, 2, 8, 16).unbind()
bias = torch.randn(1, 2, 8, 8)
compiled = torch.compile(flex_attention, dynamic=False)
output = compiled(query, key, value, score_mod=lambda score, b, h, i, j: score + bias{index})
expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias{part})
print("differs from SDPA by", float((output - expected).abs().max()))
"""
statuses = {}
for index, part in (("[b, h, i, j]", ""), ("[b][0][i][j]", "[:, :1]")):
    program = PROGRAM.replace("{index}", index).replace("{part}", part)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    statuses[index] = run.returncode
    print(index, "exit status", run.returncode, run.stdout.strip(), (run.stderr.strip().splitlines() or [""])[-1])
sys.exit(not (statuses["[b, h, i, j]"] == 0 and statuses["[b][0][i][j]"] != 0))
