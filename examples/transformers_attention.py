"""Use mha_spec as the attention of the models of Hugging Face transformers.

    import transformers_attention
    from transformers import AutoModelForCausalLM

    transformers_attention.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="mha_spec")

or `model.set_attn_implementation("mha_spec")`. It covers grouped heads, caches, generation, left padding, sliding
windows, the soft cap of Gemma, the sinks of gpt-oss, the position bias of T5, dropout in training, and weights with
`output_attentions=True`. It differs from "eager" in two ways: a padded query that sees no key gives 0, and not the
mean of all values; and the weights are those before dropout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import mha_spec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["attention", "register"]

_PYTORCH = mha_spec.backend("torch")


def register() -> None:
    """Register the name "mha_spec" for `attn_implementation`; its masks are boolean, True = may attend."""
    AttentionInterface.register("mha_spec", attention)
    AttentionMaskInterface.register("mha_spec", sdpa_mask)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool | None = None,
    **_others: object,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention with the arguments that transformers passes.

    Args:
        module: The layer that calls this function.
        query: (batch, heads, q_len, qk_dim).
        key: (batch, kv_heads, kv_len, qk_dim).
        value: (batch, kv_heads, kv_len, v_dim).
        attention_mask: (batch, 1 or heads, q_len, kv_len), boolean, or numbers that are added to the scores. With
            None, `is_causal` decides: query i sits at the position of key i, and a single query is the newest token.
        scaling: The factor of the scores, 1 / sqrt(qk_dim) by default.
        dropout: The dropout rate, 0 in evaluation.
        is_causal: By default the attribute `is_causal` of the module.
        softcap: Each score becomes softcap * tanh(score / softcap).
        position_bias: (1 or batch, heads, q_len, kv_len), which is added to the scores.
        s_aux: (heads,), the sinks: one more logit for each head, which takes weight and gives no value.
        output_attentions: True returns the weights as well.

    Returns:
        The output, (batch, q_len, heads, v_dim), and the weights, (batch, heads, q_len, kv_len), or None.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    options: dict[str, Any] = {
        "scale": scaling,
        "causal": attention_mask is None and query.shape[2] > 1 and is_causal,
        "q_offset": 0,
        "softcap": softcap,
        "sinks": s_aux,
        **_mask_and_bias(attention_mask, position_bias),
    }
    output = _PYTORCH.attention(query, key, value, dropout_rate=dropout, **options)
    weights = _PYTORCH.attention_weights(query, key, **options) if output_attentions else None
    return output.transpose(1, 2).contiguous(), weights


def _mask_and_bias(attention_mask: Tensor | None, position_bias: Tensor | None) -> dict[str, Tensor | None]:
    if attention_mask is None or attention_mask.dtype == torch.bool:
        return {"mask": attention_mask, "bias": position_bias}
    return {"mask": None, "bias": attention_mask if position_bias is None else attention_mask + position_bias}
