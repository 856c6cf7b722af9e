"""A configuration of a model, and weights that fit it."""

from __future__ import annotations

from typing import Any

import numpy

from mha_spec.weights import LoadedLayer, load_weights

Array = numpy.ndarray

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.25,
    "head_dim": 10,
    "hidden_size": 11,
    "max_position_embeddings": 64,
    "model_type": "llama",
    "num_attention_heads": 6,
    "num_hidden_layers": 5,
    "num_key_value_heads": 3,
    "rope_scaling": None,
    "rope_theta": 500.0,
    "vocab_size": 7,
}


def zeros(**shapes: tuple[int, ...]) -> dict[str, Array]:
    return {name.replace("__", "."): numpy.zeros(shape) for name, shape in shapes.items()}


STATE = zeros(q_proj__weight=(60, 11), k_proj__weight=(30, 11), v_proj__weight=(30, 11), o_proj__weight=(11, 60))
NORMS = zeros(q_norm__weight=(10,), k_norm__weight=(10,))


def loaded(state: dict[str, Array] = STATE, **changes: Any) -> LoadedLayer:
    arguments = {
        name: changes.pop(name) for name in ("layout", "layer", "seq_len", "prefix", "heads") if name in changes
    }
    return load_weights(state, config={**CONFIG, **changes}, **arguments)
