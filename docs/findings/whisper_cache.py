# /// script
# dependencies = ["openai-whisper==20250625", "torch==2.13.0"]
# ///
"""openai-whisper: with a cache, several new tokens at once see too few keys; one at a time they are right."""

import sys

import torch
from whisper.model import ModelDimensions, Whisper

torch.manual_seed(0)
model = Whisper(ModelDimensions(8, 4, 16, 2, 1, 32, 8, 16, 2, 2)).eval()
torch.nn.init.normal_(model.decoder.positional_embedding)
tokens, audio = torch.tensor([[3, 1, 4, 1, 5]]), torch.randn(1, 4, 16)


def decoded(*parts):
    """Return the logits of the last token, whose parts are decoded one after another with a cache."""
    cache, hooks = model.install_kv_cache_hooks()
    logits = [model.decoder(part, audio, kv_cache=cache) for part in parts]
    for hook in hooks:
        hook.remove()
    return logits[-1][0, -1]


with torch.no_grad():
    expected = model.decoder(tokens, audio)[0, -1]
    one_by_one = decoded(tokens[:, :2], tokens[:, 2:3], tokens[:, 3:4], tokens[:, 4:])
    together = decoded(tokens[:, :2], tokens[:, 2:])
print("2 tokens, then 1, 1, 1: error", float((one_by_one - expected).abs().max()))
print("2 tokens, then 3: error", float((together - expected).abs().max()))
sys.exit(not ((one_by_one - expected).abs().max() < 1e-4 < 1e-3 < (together - expected).abs().max()))
