# /// script
# dependencies = ["torch==2.13.0", "transformers==5.24.0"]
# ///
"""Transformers' `apply_rotary_pos_emb` of Llama, with halves, and of Cohere, interleaved, unchanged.

Their tables are those of `LlamaRotaryEmbedding` and `CohereRotaryEmbedding`, which compute them in float32.
"""

from __future__ import annotations

from transformers import CohereConfig, LlamaConfig
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

arrays = "torch"
dtypes = ("float32", "float16", "bfloat16")


def rotary_embedding(x, positions, *, base=10000.0, interleaved=False):
    """Rotate x (batch, heads, length, size)."""
    settings = {"hidden_size": x.shape[3], "num_attention_heads": 1, "head_dim": x.shape[3]}
    settings |= {"rope_parameters": {"rope_type": "default", "rope_theta": base}, "max_position_embeddings": 2**20}
    positions = positions.expand(x.shape[0], -1) if positions.ndim == 1 else positions
    if interleaved:
        cos, sin = modeling_cohere.CohereRotaryEmbedding(CohereConfig(**settings))(x, positions)
        return modeling_cohere.apply_rotary_pos_emb(x, x, cos, sin)[0]
    cos, sin = modeling_llama.LlamaRotaryEmbedding(LlamaConfig(**settings))(x, positions)
    return modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)[0]
