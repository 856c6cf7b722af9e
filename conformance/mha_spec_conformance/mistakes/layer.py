"""Mistakes of the layer: heads split, projected, normalised or merged wrongly."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import layer_checks, layer_steps
from mha_spec.layer_steps import LayerSteps
from mha_spec.reference import Reference, attention, attention_weights
from mha_spec.steps import Steps

from .mistake import LAYER, MULTI_HEAD, OUTPUT_AND_WEIGHTS, WEIGHTS_OF_LAYER, Mistake

if TYPE_CHECKING:
    from collections.abc import Callable

    from mha_spec.arrays import Array
    from mha_spec.layer_checks import LayerArguments

    Heads = tuple[Array, Array | None, Array | None]
    Within = tuple[Callable[..., Any], Callable[..., Any]]

__all__ = ["PROJECTIONS", "layered"]


def layered(
    name: str,
    title: str,
    *clauses: str,
    needs: tuple[str, ...] = (),
    functions: tuple[str, ...] = LAYER,
    bugs: tuple[str, ...] = (),
    native: bool = False,
    within: Within | None = None,
    **steps: Callable[..., object],
) -> Mistake:
    """Return a mistake that replaces steps of the layer; `within` replaces attention and attention_weights."""
    if within is not None:
        steps = {**steps, "attend": within[0], "weigh": within[1]}
    return Mistake(name, title, clauses, replace(LayerSteps(), **steps), needs, functions, bugs=bugs, native=native)


def without(*names: str) -> Callable[..., Heads]:
    """Project without the parameters `names`."""

    def project_in(a: LayerArguments, steps: LayerSteps) -> Heads:
        params = {name: array for name, array in a.params.items() if name not in names}
        return layer_steps.project_in(replace(a, params=params), steps)

    return project_in


def without_parameter(name: str) -> Callable[[LayerArguments], LayerArguments]:
    """Check the arguments, and drop a parameter."""

    def check(a: LayerArguments) -> LayerArguments:
        checked = layer_checks.check(a)
        return replace(checked, params={key: array for key, array in checked.params.items() if key != name})

    return check


def size_first(x: numpy.ndarray, weight: numpy.ndarray) -> numpy.ndarray:
    """Read the columns of the weight as (size, heads)."""
    embed, heads, size = weight.shape
    return layer_steps.project(x, weight.reshape(embed, size, heads).swapaxes(1, 2))


def split_without_transpose(x: numpy.ndarray, weight: numpy.ndarray) -> numpy.ndarray:
    """Reshape (batch, length, heads * size) to (batch, heads, length, size)."""
    heads = layer_steps.project(x, weight)
    return heads.swapaxes(1, 2).reshape(heads.shape)


def first_head(x: numpy.ndarray, weight: numpy.ndarray) -> numpy.ndarray:
    """Project every head with the weight of the first head."""
    return layer_steps.project(x, numpy.broadcast_to(weight[:, :1], weight.shape))


def exchanged(a: LayerArguments, steps: LayerSteps) -> Heads:
    """Exchange the projections of keys and values."""
    names = {"w_k": "w_v", "w_v": "w_k", "b_k": "b_v", "b_v": "b_k"}
    params = {names.get(name, name): array for name, array in a.params.items()}
    return layer_steps.project_in(replace(a, params=params), steps)


def merge_without_transpose(x: numpy.ndarray) -> numpy.ndarray:
    """Reshape (batch, heads, q_len, v_dim) to (batch, q_len, heads, v_dim)."""
    batch, heads, length, size = x.shape
    return x.reshape(batch, length, heads, size)


def size_first_out(x: numpy.ndarray, weight: numpy.ndarray) -> numpy.ndarray:
    """Read the rows of the output's weight as (size, heads)."""
    heads, size, out = weight.shape
    return layer_steps.combine(x, weight.reshape(size, heads, out).swapaxes(0, 1))


def bias_of_each_head(x: numpy.ndarray, params: dict[str, numpy.ndarray], steps: LayerSteps) -> numpy.ndarray:
    """Add the output's bias once for every head."""
    more = {"b_o": params["b_o"] * x.shape[1]} if "b_o" in params else {}
    return layer_steps.project_out(x, {**params, **more}, steps)


def no_bias_for_nothing(x: numpy.ndarray, bias: numpy.ndarray | None) -> numpy.ndarray:
    """Leave rows of zeros unchanged."""
    added = layer_steps.add_output_bias(x, bias)
    return numpy.where((x == 0).all(axis=-1, keepdims=True), x, added)


def over(**steps: Callable[..., object]) -> Within:
    """Return attention and attention_weights of the reference with other steps."""
    reference = Reference(replace(Steps(), **steps))
    return reference.attention, reference.attention_weights


def scaled_by_all_heads(function: Callable[..., Any]) -> Callable[..., Any]:
    """Use the size of all heads together in the default scale."""

    def call(query: numpy.ndarray, *operands: numpy.ndarray, **options: Any) -> Any:
        if options.get("scale") is None:
            options["scale"] = 1 / math.sqrt(query.shape[1] * query.shape[3])
        return function(query, *operands, **options)

    return call


def weigh_after_dropout(query: Any, key: Any, value: Any, steps: LayerSteps, **options: Any) -> tuple[Any, Any]:
    """Return the output, and the weights after dropout, which are the output if the values form the identity matrix."""
    identity = numpy.broadcast_to(numpy.eye(key.shape[2], dtype=key.dtype), (*key.shape[:3], key.shape[2]))
    return steps.attend(query, key, value, **options), steps.attend(query, key, identity, **options)


def layer_norm(x: numpy.ndarray, gain: numpy.ndarray, epsilon: float) -> numpy.ndarray:
    """Subtract the mean first."""
    return layer_steps.normalise(x - x.mean(axis=-1, keepdims=True), gain, epsilon)


def over_all_heads(x: numpy.ndarray, gain: numpy.ndarray, epsilon: float) -> numpy.ndarray:
    """Take the mean square over all heads of a token."""
    mean = (x * x).mean(axis=(1, 3), keepdims=True)
    return x / numpy.sqrt(mean + epsilon) * gain


def euclidean(x: numpy.ndarray, gain: numpy.ndarray, epsilon: float) -> numpy.ndarray:
    """Divide by the root of the sum of squares."""
    return x / numpy.sqrt((x * x).sum(axis=-1, keepdims=True) + epsilon) * gain


def epsilon_outside(x: numpy.ndarray, gain: numpy.ndarray, epsilon: float) -> numpy.ndarray:
    """Add epsilon to the root."""
    return x / (numpy.sqrt((x * x).mean(axis=-1, keepdims=True)) + epsilon) * gain


def normalised(a: LayerArguments, x: numpy.ndarray | None, name: str) -> numpy.ndarray | None:
    """Normalise if the layer has this norm."""
    gain = a.params.get(f"{name}_norm")
    return x if x is None or gain is None else layer_steps.normalise(x, gain, a.norm_epsilon)


def bias_after_norm(a: LayerArguments, steps: LayerSteps) -> Heads:
    """Normalise the projections, and then add the biases."""
    q, k, v = without("b_q", "b_k")(a, steps)
    heads = {name: normalised(a, x, name) for name, x in (("q", q), ("k", k))}
    q, k = (x if x is None else layer_steps.add_bias(x, a.params.get(f"b_{name}")) for name, x in heads.items())
    return q, k, v


def values_too(a: LayerArguments, steps: LayerSteps) -> Heads:
    """Normalise the values as well."""
    q, k, v = layer_steps.project_in(a, steps)
    if v is not None and "k_norm" in a.params:
        v = layer_steps.normalise(v, numpy.ones(v.shape[3], v.dtype), a.norm_epsilon)
    return q, k, v


class LateNorm:
    """Norms that are applied after the rotation."""

    def __init__(self) -> None:
        self._waiting: list[tuple[numpy.ndarray, float]] = []

    def keep(self, x: numpy.ndarray, gain: numpy.ndarray, epsilon: float) -> numpy.ndarray:
        """Remember the norm, and return the heads unchanged."""
        self._waiting = [*self._waiting[-1:], (gain, epsilon)]
        return x

    def turn(self, x: numpy.ndarray, turns: Any, interleaved: bool) -> numpy.ndarray:
        """Rotate, and then normalise."""
        gain, epsilon = self._waiting.pop(0)
        return layer_steps.normalise(layer_steps.turn(x, turns, interleaved), gain, epsilon)


LATE = LateNorm()

PROJECTIONS = (
    layered(
        "heads-split-size-first",
        "reads the columns of a projection as (size, heads)",
        "MHA-PROJ-1",
        project=size_first,
    ),
    layered(
        "heads-split-without-transpose",
        "splits heads by a reshape without exchanging the axes, so that heads mix tokens",
        "MHA-PROJ-1",
        project=split_without_transpose,
        bugs=("onnx/onnx#7118", "reczoo/FuxiCTR#30", "tinygrad/tinygrad PR#14025"),
    ),
    layered(
        "heads-project-alike",
        "projects every head with the weight of the first",
        "MHA-PROJ-1",
        project=first_head,
        bugs=("MarcoMeter/episodic-transformer-memory-ppo PR#22",),
    ),
    layered(
        "keys-and-values-exchanged",
        "exchanges the projections of keys and values",
        "MHA-PROJ-1",
        "MHA-LAYER-1",
        project_in=exchanged,
        needs=("value",),
        functions=MULTI_HEAD,
        bugs=("awslabs/slapo PR#46", "tenstorrent/tt-metal#6243"),
    ),
    layered(
        "query-bias-forgotten",
        "does not add b_q",
        "MHA-PROJ-2",
        project_in=without("b_q"),
        needs=("b_q",),
    ),
    layered(
        "key-bias-forgotten",
        "does not add b_k",
        "MHA-PROJ-2",
        project_in=without("b_k"),
        needs=("b_k",),
    ),
    layered(
        "value-bias-forgotten",
        "does not add b_v",
        "MHA-PROJ-2",
        project_in=without("b_v"),
        needs=("b_v",),
        functions=MULTI_HEAD,
    ),
    layered(
        "output-bias-forgotten",
        "does not add b_o",
        "MHA-PROJ-3",
        "MHA-LAYER-5",
        add_output_bias=lambda x, bias: x,
        needs=("b_o",),
        functions=MULTI_HEAD,
    ),
    layered(
        "output-bias-of-each-head",
        "adds b_o once per head",
        "MHA-PROJ-3",
        project_out=bias_of_each_head,
        needs=("b_o",),
        functions=MULTI_HEAD,
    ),
    layered(
        "empty-row-without-output-bias",
        "returns 0 instead of b_o for an empty row",
        "MHA-LAYER-5",
        add_output_bias=no_bias_for_nothing,
        needs=("b_o",),
        functions=MULTI_HEAD,
    ),
    layered(
        "heads-merged-without-transpose",
        "merges heads by a reshape without exchanging the axes, so that tokens mix",
        "MHA-PROJ-3",
        merge_heads=merge_without_transpose,
        functions=MULTI_HEAD,
        bugs=(
            "jsbaan/transformer-from-scratch PR#6",
            "jadore801120/attention-is-all-you-need-pytorch#7",
            "ajhalthor/Transformer-Neural-Network PR#4",
        ),
    ),
    layered(
        "heads-merged-size-first",
        "reads the rows of the output projection as (size, heads)",
        "MHA-PROJ-3",
        combine=size_first_out,
        functions=MULTI_HEAD,
    ),
    layered(
        "layer-groups-tiled",
        "lets query head h read key/value head h % kv_heads in the layer",
        "MHA-LAYER-1",
        within=over(repeat_heads=lambda x, heads: numpy.tile(x, (1, heads // x.shape[1], 1, 1))),
        bugs=("onnx/onnx#7274",),
    ),
    layered(
        "layer-scale-of-all-heads",
        "scales by 1/sqrt(heads * qk_dim) in the layer",
        "MHA-LAYER-1",
        attend=scaled_by_all_heads(attention),
        weigh=scaled_by_all_heads(attention_weights),
        bugs=("karpathy/ng-video-lecture#6",),
    ),
    layered(
        "weights-averaged-over-heads",
        "returns the mean of the weights over heads for every head",
        "MHA-LAYER-4",
        weigh=lambda query, key, **options: numpy.broadcast_to(
            attention_weights(query, key, **options).mean(axis=1, keepdims=True),
            (*query.shape[:3], key.shape[2]),
        ),
        functions=WEIGHTS_OF_LAYER,
        bugs=("pytorch/pytorch#47583", "facebookresearch/fairseq#3365"),
    ),
    layered(
        "weights-after-dropout",
        "returns the weights after dropout, whose rows do not add up to 1",
        "MHA-LAYER-4",
        attend_and_weigh=weigh_after_dropout,
        needs=("dropout_mask",),
        functions=OUTPUT_AND_WEIGHTS,
        bugs=("pytorch/pytorch#42929", "facebookresearch/fairseq#351", "Dao-AILab/flash-attention#902"),
    ),
    layered(
        "norm-ignored",
        "accepts q_norm and k_norm and does not use them",
        "MHA-NORM-1",
        "MHA-NORM-2",
        normalise=lambda x, gain, epsilon: x,
        needs=("q_norm",),
    ),
    *(
        layered(
            f"{name}-norm-skipped",
            f"accepts {name[0]}_norm and does not use it",
            "MHA-NORM-1",
            check=without_parameter(f"{name[0]}_norm"),
            needs=(f"{name[0]}_norm",),
            bugs=("vllm-project/vllm-metal#659",),
        )
        for name in ("query", "key")
    ),
    layered(
        "norm-gain-ignored",
        "normalises without the gain",
        "MHA-NORM-1",
        normalise=lambda x, gain, epsilon: layer_steps.normalise(x, numpy.ones_like(gain), epsilon),
        needs=("q_norm",),
    ),
    layered(
        "norm-gain-plus-one",
        "multiplies by 1 + gain",
        "MHA-NORM-1",
        normalise=lambda x, gain, epsilon: layer_steps.normalise(x, 1 + gain, epsilon),
        needs=("q_norm",),
    ),
    layered(
        "norm-subtracts-the-mean",
        "subtracts the mean first, as in layer normalisation",
        "MHA-NORM-1",
        normalise=layer_norm,
        needs=("q_norm",),
    ),
    layered(
        "norm-over-all-heads",
        "computes the mean square over all heads of a token",
        "MHA-NORM-1",
        normalise=over_all_heads,
        needs=("q_norm",),
        bugs=("EleutherAI/gpt-neox#1367", "Alpha-VLLM/Lumina-T2X#112"),
    ),
    layered(
        "norm-euclidean",
        "divides by the Euclidean norm of a head's vector instead of its root mean square",
        "MHA-NORM-1",
        normalise=euclidean,
        needs=("q_norm",),
    ),
    layered(
        "norm-epsilon-ignored",
        "uses a fixed epsilon, whatever norm_epsilon is",
        "MHA-NORM-1",
        normalise=lambda x, gain, epsilon: layer_steps.normalise(x, gain, 1e-6),
        needs=("norm_epsilon",),
    ),
    layered(
        "norm-epsilon-outside-the-root",
        "adds epsilon to the root instead of the mean square",
        "MHA-NORM-1",
        normalise=epsilon_outside,
        needs=("norm_epsilon",),
    ),
    layered(
        "norm-before-bias",
        "adds the biases after normalising",
        "MHA-NORM-2",
        "MHA-LAYER-1",
        project_in=bias_after_norm,
        normalise=lambda x, gain, epsilon: x,
        needs=("q_norm", "b_q"),
    ),
    layered(
        "norm-after-rotation",
        "normalises after the rotation",
        "MHA-NORM-2",
        "MHA-LAYER-1",
        normalise=LATE.keep,
        turn=LATE.turn,
        needs=("q_norm", "k_norm", "rotary"),
        bugs=("karpathy/nanochat#743", "allenai/OLMo#806"),
    ),
    layered(
        "norm-of-values",
        "normalises the values too",
        "MHA-NORM-2",
        project_in=values_too,
        needs=("k_norm",),
        functions=MULTI_HEAD,
    ),
)
