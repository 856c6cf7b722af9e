"""The parameters of the layer: their names and their axes."""

from __future__ import annotations

__all__ = ["AXES", "JOINT_NORMS", "REQUIRED"]

AXES = {
    "w_q": ("embed", "heads", "qk_dim"),
    "w_k": ("k_embed", "kv_heads", "qk_dim"),
    "w_v": ("v_embed", "kv_heads", "v_dim"),
    "w_o": ("heads", "v_dim", "out"),
    "b_q": ("heads", "qk_dim"),
    "b_k": ("kv_heads", "qk_dim"),
    "b_v": ("kv_heads", "v_dim"),
    "b_o": ("out",),
    "q_norm": ("qk_dim",),
    "k_norm": ("qk_dim",),
    "q_joint_norm": ("heads", "qk_dim"),
    "k_joint_norm": ("kv_heads", "qk_dim"),
}
"""The axes of every parameter (MHA-PROJ-1, MHA-PROJ-2, MHA-PROJ-3, MHA-NORM-1, MHA-NORM-3)."""

JOINT_NORMS = {"q_norm": "q_joint_norm", "k_norm": "k_joint_norm"}
"""The gain of a norm over all heads that excludes each gain of a norm per head (MHA-NORM-3)."""

REQUIRED = ("w_q", "w_k", "w_v", "w_o")
"""The parameters that every layer has."""
