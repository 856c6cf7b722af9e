"""The arguments of an attention call, and the signatures that name them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from .varlen_arguments import VARLEN_FUNCTIONS, VARLEN_OPTIONS, VarlenArguments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Bool, Float, Int

    from .arrays import Array

__all__ = [
    "DROPOUT_OPTIONS",
    "OPTIONS",
    "PAIRWISE_OPTIONS",
    "READINGS",
    "SHARDED_FUNCTIONS",
    "WEIGHT_FUNCTIONS",
    "Arguments",
    "NoOptions",
    "Options",
    "WeightOptions",
    "decorate_method",
    "expand_options",
    "offset_of_reading",
    "options_of",
]


class WeightOptions(TypedDict, total=False):
    """The options that shape the weights, by default None or False; axes marked `*` may be 1 and broadcast."""

    mask: Bool[Array, "batch* heads* q_len* kv_len*"] | None
    """True = may attend, as in torch SDPA, jax.nn and ONNX; in torch's MultiheadAttention True hides (MHA-MASK-1)."""
    bias: Float[Array, "batch* heads* q_len* kv_len*"] | None
    """Added to the scaled, capped scores; -inf hides its pair (MHA-BIAS-1, MHA-BIAS-3)."""
    causal: bool
    """Key j is seen from position p where j <= p (MHA-CAUSAL-1)."""
    q_offset: Int[Array, "batch"] | Int[Array, ""] | Sequence[int] | int | str | None
    """Position of query 0, or "upper_left" (0) or "lower_right" (kv_lengths - q_lengths, by default kv_len and q_len);
    required where causal or window meet unequal lengths (MHA-POS-1, MHA-POS-2)."""
    window: tuple[int | None, int | None] | None
    """(left, right), both inclusive, in positions: -left <= j - p <= right (MHA-WINDOW-1, MHA-WINDOW-2)."""
    chunk: int | None
    """Position p sees the keys of its own chunk of this many positions, counted from kv_starts (MHA-WINDOW-3)."""
    prefix_lengths: Int[Array, "batch"] | Sequence[int] | None
    """causal hides no key j < prefix_lengths[b]; a window, a chunk and all other options still do (MHA-CAUSAL-2)."""
    q_lengths: Int[Array, "batch"] | Sequence[int] | None
    """Rows at or past q_lengths[b] see nothing (MHA-LEN-2)."""
    kv_lengths: Int[Array, "batch"] | Sequence[int] | None
    """Keys at or past kv_lengths[b] are invisible (MHA-LEN-1)."""
    kv_starts: Int[Array, "batch"] | Sequence[int] | None
    """Keys before kv_starts[b], which are padding, are invisible; no position changes (MHA-LEN-4)."""
    q_segment_ids: Int[Array, "batch q_len"] | None
    """Packed sequences: equal ids see each other (MHA-SEG-1)."""
    kv_segment_ids: Int[Array, "batch kv_len"] | None
    """The ids of the keys; required with q_segment_ids (MHA-SEG-1)."""
    scale: float | None
    """1/sqrt(qk_dim) by default (MHA-SCORE-2)."""
    softcap: float | None
    """softcap * tanh(scores / softcap), before bias and mask (MHA-CAP-1, MHA-CAP-2)."""
    sinks: Float[Array, "heads"] | None
    """One more logit per query head, which takes weight and has no value (MHA-SINK-1)."""


class Options(WeightOptions, total=False):
    """All options of attention."""

    dropout_rate: float
    """Kept weights are divided by 1 - dropout_rate (MHA-DROP-1)."""
    dropout_mask: Bool[Array, "batch* heads* q_len* kv_len*"] | None
    """True = keep; applies at rate 0 too (MHA-DROP-2)."""
    dropout_key: Any
    """The random state from which a backend draws a missing dropout_mask (MHA-DROP-4)."""


class NoOptions(TypedDict):
    """The options of merge_attention, which accepts no keyword (MHA-ARG-1)."""


@dataclass(slots=True)
class Arguments:
    """The three tensors and all options of an attention call."""

    query: Array
    key: Array
    value: Array
    """None for the functions of weights only, which need no value."""
    mask: Array | None = None
    bias: Array | None = None
    causal: bool = False
    q_offset: Array | Sequence[int] | int | str | None = None
    window: tuple[int | None, int | None] | None = None
    chunk: int | None = None
    prefix_lengths: Array | Sequence[int] | None = None
    q_lengths: Array | Sequence[int] | None = None
    kv_lengths: Array | Sequence[int] | None = None
    kv_starts: Array | Sequence[int] | None = None
    q_segment_ids: Array | None = None
    kv_segment_ids: Array | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: Array | None = None
    dropout_rate: float = 0.0
    dropout_mask: Array | None = None
    dropout_key: Any = None
    function: str = "attention"
    """The name of the function that was called."""

    @property
    def weighs(self) -> bool:
        """True for the functions of weights only, which need no value."""
        return self.function in WEIGHT_FUNCTIONS

    @property
    def batch(self) -> int:
        """Number of batch entries."""
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.key.shape[1]

    @property
    def q_len(self) -> int:
        """Number of queries."""
        return self.query.shape[2]

    @property
    def kv_len(self) -> int:
        """Number of keys."""
        return self.key.shape[2]

    @property
    def bounded_window(self) -> tuple[int | None, int | None] | None:
        """The window, or None where it bounds neither side."""
        return None if self.window is None or tuple(self.window) == (None, None) else self.window

    @property
    def positional(self) -> bool:
        """True if a constraint compares positions, so that the causal diagonal must be known."""
        return self.causal or self.bounded_window is not None or self.chunk is not None

    @property
    def is_structured(self) -> bool:
        """True if more than the distance of a pair decides whether positions show it."""
        return self.chunk is not None or self.prefix_lengths is not None

    @property
    def bounds(self) -> tuple[int | None, int | None]:
        """The bounds (left, right) of a key's distance; causal is the window (None, 0) (MHA-CAUSAL-1, MHA-WINDOW-2)."""
        left, right = self.window or (None, None)
        return left, 0 if self.causal else right

    @property
    def unlifted_right(self) -> int | None:
        """The right bound of the window, which holds where a prefix lifts that of causal (MHA-CAUSAL-2)."""
        return None if self.window is None or self.prefix_lengths is None else self.window[1]

    @property
    def band(self) -> int | None:
        """The number of keys that a row sees, minus 1, if a window bounds both sides."""
        left, right = self.bounds if self.prefix_lengths is None else (self.bounds[0], self.unlifted_right)
        return None if left is None or right is None else left + right


OPTIONS = tuple(field.name for field in fields(Arguments) if field.name not in {"query", "key", "value", "function"})
"""The names of all options, in the order of the signature."""

WEIGHT_FUNCTIONS = ("attention_weights", "multi_head_attention_weights")
"""The functions that return weights only."""

DROPOUT_OPTIONS = ("dropout_rate", "dropout_mask", "dropout_key")
"""The options that functions of weights do not have."""

WEIGHT_OPTIONS = tuple(name for name in OPTIONS if name not in DROPOUT_OPTIONS)
"""The options that functions of weights have."""

UPPER_LEFT, LOWER_RIGHT = "upper_left", "lower_right"

READINGS = (UPPER_LEFT, LOWER_RIGHT)
"""The alignments that q_offset may name (MHA-POS-2)."""

MERGING_FUNCTIONS = ("merge_attention", "merge_attention_vjp")

SHARDED_FUNCTIONS = ("ring_attention", "all_to_all_attention", "sharded_kv_attention")
"""The functions over several devices, of which each holds a shard (MHA-SHARD-3)."""

PAIRWISE_OPTIONS = ("mask", "bias", *DROPOUT_OPTIONS)
"""The options that hold or draw a number for each pair, which a sharded call does not take (MHA-SHARD-6)."""

_Function = TypeVar("_Function", bound="Callable[..., Any]")


def options_of(function: str) -> tuple[str, ...]:
    """Name the options that a function of the specification accepts, those of attention or of packed calls."""
    if function in MERGING_FUNCTIONS:
        return ()
    if function in VARLEN_FUNCTIONS:
        return VARLEN_OPTIONS
    if function in SHARDED_FUNCTIONS:
        return tuple(name for name in OPTIONS if name not in PAIRWISE_OPTIONS)
    return WEIGHT_OPTIONS if function in WEIGHT_FUNCTIONS else OPTIONS


def offset_of_reading(reading: str, q_length: Any, kv_length: Any) -> Any:
    """Compute the q_offset of a named alignment from the lengths in use, integers or arrays (MHA-POS-2)."""
    return kv_length - q_length if reading == LOWER_RIGHT else 0


def decorate_method(decorator: Callable[[_Function], _Function], method: _Function) -> _Function:
    """Decorate a bound method; functools.wraps alone would copy the signature that has `self`."""
    function = decorator(method)
    vars(function)["__signature__"] = inspect.signature(method)
    return function


def expand_options(function: _Function) -> _Function:
    """Set the signature of a function to name every option of its `**options`, with the default."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    arguments = VarlenArguments if function.__name__ in VARLEN_FUNCTIONS else Arguments
    options = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default)
        for field in fields(arguments)
        if field.name in options_of(function.__name__)
    ]
    positional = [parameter for parameter in parameters if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    keyword = [parameter for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    vars(function)["__signature__"] = signature.replace(parameters=[*positional, *options, *keyword])
    return function
