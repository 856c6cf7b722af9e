"""The frequencies of rotary embedding that models scale for long contexts, from the dictionaries of their configs.

Everything is computed on the host in float32, in the order of operations of `transformers.modeling_rope_utils`, with
whose float32 tables models were trained and are run. `Parameters` reads a dictionary, and each method is a function.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy

from .array_checks import is_mapping, is_sequence, python_values
from .errors import refuse_type, refuse_value
from .scalars import are_equal_numbers, check_flag, check_integer, is_integer, is_number, plain, short_repr

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["LARGEST_DIM", "rotary_frequencies"]

LARGEST_FLOAT32 = float(numpy.finfo(numpy.float32).max)
LARGEST_DIM = 2**20
"""The largest size for which frequencies are computed."""
DEFAULT_BASE = 10000.0


def rotary_frequencies(
    scaling: Mapping[str, Any] | None,
    dim: int,
    base: float | None = None,
    *,
    max_position_embeddings: int | None = None,
    original_max_position_embeddings: int | None = None,
    partial_rotary_factor: float | None = None,
    seq_len: int | None = None,
) -> tuple[numpy.ndarray, float]:
    """Compute the frequencies and the attention factor of a model from its config, for `rotary_embedding`.

        linear        1 / (factor base^(2i/r))                                    kaiokendev 2023
        dynamic       base grows with seq_len / max_position_embeddings           NTK-aware, bloc97 and emozilla 2023
        yarn          mixes 1 / base^(2i/r) and 1 / (factor base^(2i/r))          Peng et al. 2023, arXiv 2309.00071
        longrope      1 / (long_factor[i] base^(2i/r)), or short_factor[i]        Ding et al. 2024, arXiv 2402.13753
        llama3        divides the frequencies of long wavelengths by factor       Llama 3.1, config.json
        proportional  1 / base^(2i/dim) for the first pairs, 0 for the others     Gemma 4, config.json

    with r = int(dim * partial_rotary_factor). The keyword arguments are the keys of the same name that a config has
    outside of this dictionary, if it has them.

    Args:
        scaling: `rope_scaling` or `rope_parameters` of the config, with `rope_type` or `type`; None is "default". Of
            `rope_parameters` that hold a dictionary for each kind of layer, pass that of the layer.
        dim: The size of a head; of DeepSeek, `qk_rope_head_dim`.
        base: `rope_theta`; None is that of `scaling`, or else 10000.
        max_position_embeddings: Required by "dynamic"; "yarn" and "longrope" without `factor` divide it by the next.
        original_max_position_embeddings: The length of pretraining, for "yarn", "longrope" and "llama3"; None is that
            of `scaling`, or else max_position_embeddings.
        partial_rotary_factor: The share of the head that turns, such as `rotary_pct` of GPT-NeoX; None is that of
            `scaling`, or else 1.
        seq_len: The number of tokens, cached tokens included, on which "dynamic" and "longrope" depend; None is a
            length for which the model was trained.

    Returns:
        The frequencies, float32 (r/2,), or (dim/2,) for "proportional", and the attention factor.

    Raises:
        ArgumentValueError, ArgumentTypeError: A key is missing, unknown or wrong, or two sources of a value differ.

    Differs from others:
        The power base^(2i/r) is rounded correctly to float32; that of PyTorch, with which transformers computes it,
        is the next float32 for about 1 frequency in 80, which depends on the processor.
        transformers logs a warning for a factor below 1 and for unknown keys.
        DeepSeek multiplies `scale` by another factor, which follows from `mscale_all_dim`; pass it as `scale`.

    Source:
        SPEC.md, MHA-ROTARY-9 to MHA-ROTARY-16.
    """
    outside = {
        "rope_theta": base,
        "max_position_embeddings": max_position_embeddings,
        "original_max_position_embeddings": original_max_position_embeddings,
        "partial_rotary_factor": partial_rotary_factor,
    }
    keys = _keys(scaling)
    method = METHODS[_kind(keys)]
    _check_keys(keys, method)
    parameters = Parameters(_joined(keys, outside), _checked_dim(dim), _length(seq_len))
    parameters.check()
    return _computed(method, parameters, scaling)


def _computed(method: Method, parameters: Parameters, scaling: Mapping[str, Any] | None) -> tuple[numpy.ndarray, float]:
    """Compute by a method, and require frequencies that are finite (MHA-ROTARY-16)."""
    with numpy.errstate(all="ignore"):  # Overflow in float32 is an error below.
        frequencies, attention_factor = method.compute(parameters)
    if not numpy.isfinite(frequencies).all():
        refuse_value(
            "MHA-ROTARY-16",
            "`base` and `scaling` must give frequencies that are finite in float32, "
            f"received base={short_repr(parameters.base)}, scaling={short_repr(scaling)}.",
        )
    return frequencies, attention_factor


@dataclass(frozen=True)
class Parameters:
    """The parameters of a method, which are read by their key."""

    keys: Mapping[str, Any]
    dim: int
    seq_len: int | None

    @property
    def base(self) -> float:
        """The base, rope_theta."""
        return self.number("rope_theta", default=DEFAULT_BASE)

    @property
    def share(self) -> float:
        """The share of the components that turn."""
        return self.number("partial_rotary_factor", default=1.0)

    @property
    def turned(self) -> int:
        """The number r of components that turn; transformers rounds an odd number up to whole pairs."""
        return int(self.dim * self.share)

    @property
    def original(self) -> int:
        """The length for which the model was trained at first (MHA-ROTARY-12)."""
        original, extended = "original_max_position_embeddings", "max_position_embeddings"
        return self.integer(extended if self.has(extended) and not self.has(original) else original)

    @property
    def factor(self) -> float:
        """The factor of the context, by default the ratio of both lengths."""
        if self.has("factor"):
            return self.number("factor", least=1.0)
        if not self.has("max_position_embeddings"):
            self.refuse("factor", "be given, or max_position_embeddings with original_max_position_embeddings")
        return self.integer("max_position_embeddings") / self.original

    def check(self) -> None:
        """Require pairs of components, and numbers that every method needs (MHA-ROTARY-16)."""
        if not 0 < self.share <= 1:
            self.refuse("partial_rotary_factor", "be 0<partial_rotary_factor<=1")
        if not self.turned or self.turned + self.turned % 2 > self.dim:
            refuse_value(
                "MHA-ROTARY-16",
                f"`dim` must have whole pairs of components that turn, received dim={self.dim}, "
                f"partial_rotary_factor={short_repr(self.share)}.",
            )
        if not self.base:
            self.refuse("rope_theta", "be rope_theta>0")

    def has(self, key: str) -> bool:
        """Tell whether a key has a value other than None."""
        return self.keys.get(key) is not None

    def number(self, key: str, *, default: float | None = None, least: float = 0.0) -> float:
        """Return a finite number in the range of float32 that is at least `least`."""
        value = plain(self.keys.get(key))
        if value is None and default is not None:
            return default
        if not is_number(value):
            self.refuse(key, "be a number", refuse_type if value is not None else refuse_value)
        if not least <= value <= LARGEST_FLOAT32:
            self.refuse(key, f"be finite and {key}>={least:g}")
        return value

    def positive(self, key: str, *, default: float | None = None) -> float:
        """Return a finite number above 0."""
        value = self.number(key, default=default)
        if not value:
            self.refuse(key, f"be {key}>0")
        return value

    def integer(self, key: str) -> int:
        """Return an integer above 0."""
        value = plain(self.keys.get(key))
        if value is not None and not is_integer(value):
            self.refuse(key, "be an integer", refuse_type)
        if value is None or not 0 < value <= 2**53:
            self.refuse(key, f"be {key}>=1")
        return value

    def factors(self, key: str, pairs: int) -> numpy.ndarray:
        """Return a list with a positive factor for each pair, in float32."""
        value = self.keys.get(key)
        numbers = python_values(value)
        if numbers is None or not all(map(is_number, numbers)):
            self.refuse(key, "be a list of numbers", refuse_type)
        if len(numbers) != pairs or not all(0 < number <= LARGEST_FLOAT32 for number in numbers):
            self.refuse(key, f"hold a number above 0 for each of {pairs} pairs")
        return numpy.asarray(numbers, dtype=numpy.float32)

    def refuse(self, key: str, must: str, refuse: Callable[[str, str], NoReturn] = refuse_value) -> NoReturn:
        """Raise an error that names a key."""
        value = self.keys.get(key)
        size = f" of length {len(value)}" if is_sequence(value) else ""
        label = "`rope_theta`, the base," if key == "rope_theta" else f"`{key}`"
        refuse("MHA-ROTARY-16", f"{label} must {must}, received {key}={short_repr(value)}{size}.")


def _powers(base: float, dim: int, turned: int) -> numpy.ndarray:
    """Compute base^(2i/dim) for 2i < turned, rounded once to float32; the exponent is a float32 (MHA-ROTARY-9)."""
    exponents = numpy.arange(0, turned, 2, dtype=numpy.float32) / numpy.float32(dim)
    return (numpy.float64(numpy.float32(base)) ** exponents.astype(numpy.float64)).astype(numpy.float32)


def _default(p: Parameters) -> tuple[numpy.ndarray, float]:
    """Frequencies without a scaling (MHA-ROTARY-9)."""
    return 1 / _powers(p.base, p.turned, p.turned), 1.0


def _linear(p: Parameters) -> tuple[numpy.ndarray, float]:
    """Divide each frequency, as if positions were divided (MHA-ROTARY-10)."""
    return 1 / _powers(p.base, p.turned, p.turned) / p.number("factor", least=1.0), 1.0


def _dynamic(p: Parameters) -> tuple[numpy.ndarray, float]:
    """Raise the base with the length of the sequence (MHA-ROTARY-11)."""
    longest, factor, turned = p.integer("max_position_embeddings"), p.number("factor", least=1.0), p.turned
    if turned < 3:
        refuse_value("MHA-ROTARY-16", f"`dim` must leave 4 or more components that turn, received dim={p.dim}.")
    length = max(longest if p.seq_len is None else p.seq_len, longest)
    growth = (factor * length / longest) - (factor - 1)
    base = p.base * growth ** (turned / (turned - 2))
    if base > LARGEST_FLOAT32:
        refuse_value(
            "MHA-ROTARY-16", f"`seq_len` must leave a base in the range of float32, received seq_len={p.seq_len}."
        )
    return 1 / _powers(base, turned, turned), 1.0


def _yarn(p: Parameters) -> tuple[numpy.ndarray, float]:
    """Divide the frequencies of pairs that turn rarely, mix those between, keep the others (MHA-ROTARY-12)."""
    factor, powers = p.factor, _powers(p.base, p.turned, p.turned)
    first, last = _corrected_pairs(p)
    ramp = (numpy.arange(len(powers), dtype=numpy.float32) - first) / (last - first)
    kept = 1 - numpy.clip(ramp, 0, 1)
    return 1 / (factor * powers) * (1 - kept) + 1 / powers * kept, _yarn_attention_factor(p, factor)


def _corrected_pairs(p: Parameters) -> tuple[float, float]:
    """Return the pair from which frequencies are mixed, and the pair from which they are divided."""
    most, least = p.positive("beta_fast", default=32), p.positive("beta_slow", default=1)
    if most < least:
        p.refuse("beta_fast", f"be beta_fast>=beta_slow={short_repr(least)}")
    if p.base <= 1:
        p.refuse("rope_theta", "be rope_theta>1 for yarn")
    first, last = (
        (p.turned * math.log(p.original / (turns * 2 * math.pi))) / (2 * math.log(p.base)) for turns in (most, least)
    )
    truncate = p.keys.get("truncate")
    if truncate is None or check_flag("truncate", truncate, "MHA-ROTARY-16"):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, p.turned - 1)
    return first, last + 0.001 if first == last else last


def _yarn_attention_factor(p: Parameters, factor: float) -> float:
    if p.has("attention_factor"):
        return float(p.positive("attention_factor"))
    scale, of_all = p.number("mscale", default=0.0), p.number("mscale_all_dim", default=0.0)
    if scale and of_all:
        return _magnitude(factor, scale) / _magnitude(factor, of_all)
    return _magnitude(factor, 1)


def _magnitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(p: Parameters) -> tuple[numpy.ndarray, float]:
    """Divide each frequency by its factor in the short or the long list (MHA-ROTARY-13)."""
    powers = _powers(p.base, p.turned, p.turned)
    length = "long" if p.seq_len is not None and p.seq_len > p.original else "short"
    factors = {name: p.factors(f"{name}_factor", len(powers)) for name in ("short", "long")}
    return 1 / (factors[length] * powers), _longrope_attention_factor(p, length)


def _longrope_attention_factor(p: Parameters, length: str) -> float:
    if p.has("attention_factor"):
        return float(p.positive("attention_factor"))
    if p.has("short_mscale") or p.has("long_mscale"):
        return float({name: p.positive(f"{name}_mscale") for name in ("short", "long")}[length])
    if p.factor <= 1:
        return 1.0
    if p.original == 1:
        p.refuse("original_max_position_embeddings", "be above 1")
    return math.sqrt(1 + math.log(p.factor) / math.log(p.original))


def _llama3(p: Parameters) -> tuple[numpy.ndarray, float]:
    """Divide the frequencies of long waves, mix those between, keep those of short waves (MHA-ROTARY-14)."""
    factor, length = p.number("factor", least=1.0), p.original
    low, high = p.positive("low_freq_factor"), p.positive("high_freq_factor")
    if high < low:
        p.refuse("high_freq_factor", f"be high_freq_factor>=low_freq_factor={short_repr(low)}")
    frequencies = 1 / _powers(p.base, p.turned, p.turned)
    # PyTorch computes a number divided by an array as the array's reciprocal times the number.
    waves = 1 / frequencies * (2 * math.pi)
    kept = (1 / waves * length - low) / (high - low)  # Not a number if both are equal; no wave is then between.
    divided = numpy.where(waves > length / low, frequencies / factor, frequencies)
    mixed = (1 - kept) * divided / factor + kept * divided
    between = (waves >= length / high) & (waves <= length / low)
    return numpy.where(between, mixed, divided), 1.0


def _proportional(p: Parameters) -> tuple[numpy.ndarray, float]:
    """Leave the last pairs of the whole head without a turn: their frequency is 0 (MHA-ROTARY-15)."""
    if p.dim % 2:
        refuse_value("MHA-ROTARY-16", f"`dim` must be even for proportional, received dim={p.dim}.")
    pairs = int(p.share * p.dim // 2)
    frequencies = numpy.zeros(p.dim // 2, dtype=numpy.float32)
    frequencies[:pairs] = 1 / _powers(p.base, p.dim, 2 * pairs)
    return frequencies / p.number("factor", default=1.0, least=1.0), 1.0


class Method(NamedTuple):
    """A method with the keys that it needs, and those that it reads if a dictionary has them."""

    compute: Callable[[Parameters], tuple[numpy.ndarray, float]]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


_LENGTHS = ("original_max_position_embeddings", "max_position_embeddings")
_OF_YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "attention_factor", "factor", *_LENGTHS)
_OF_LONGROPE = ("short_mscale", "long_mscale", "attention_factor", "factor", *_LENGTHS)

METHODS: dict[str, Method] = {
    "default": Method(_default),
    "linear": Method(_linear, ("factor",)),
    "dynamic": Method(_dynamic, ("factor",), ("max_position_embeddings",)),
    "yarn": Method(_yarn, (), _OF_YARN),
    "longrope": Method(_longrope, ("short_factor", "long_factor"), _OF_LONGROPE),
    "llama3": Method(_llama3, ("factor", "low_freq_factor", "high_freq_factor"), _LENGTHS),
    "proportional": Method(_proportional, (), ("factor",)),
}
"""The methods by their `rope_type`."""

OLDER_NAMES = {"su": "longrope", "mrope": "default"}
"""Names of Phi-3's and Qwen2-VL's first configs."""

COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
WITHOUT_EFFECT = ("mrope_section", "mrope_interleaved", "llama_4_scaling_beta", "finetuned")
"""Keys that concern positions, scores or training, and no frequency."""


def _keys(scaling: object) -> dict[str, Any]:
    """Return the keys that have a value other than None."""
    if scaling is None:
        return {}
    if not is_mapping(scaling):
        refuse_type(
            "MHA-ROTARY-16",
            "`scaling` must be a dictionary as the rope_scaling of a config, or None, "
            f"received {short_repr(scaling)} of type {type(scaling).__name__}.",
        )
    nested = [str(key) for key, value in scaling.items() if is_mapping(value)]
    if nested:
        refuse_value(
            "MHA-ROTARY-16",
            f"`scaling` must be the dictionary of a single kind of layer, received those of {', '.join(nested)}. "
            f"Pass scaling[{nested[0]!r}].",
        )
    return {key: value for key, value in scaling.items() if value is not None}


def _kind(keys: Mapping[str, Any]) -> str:
    """Return the name of the method, which older configs hold in `type`."""
    key = "type" if "type" in keys and "rope_type" not in keys else "rope_type"
    name = keys.get(key, "default")
    if not isinstance(name, str):
        refuse_type("MHA-ROTARY-16", f"`{key}` must be a string, received {key}={short_repr(name)}.")
    name = OLDER_NAMES.get(name, name)
    if name not in METHODS:
        refuse_value(
            "MHA-ROTARY-16", f"`{key}` must be one of {', '.join(METHODS)}, received {key}={short_repr(name)}."
        )
    return name


def _check_keys(keys: Mapping[str, Any], method: Method) -> None:
    """Require the keys of a method, and refuse others, which could ask for another method."""
    missing = [key for key in method.required if key not in keys]
    known = (*COMMON, *method.required, *method.optional, *WITHOUT_EFFECT)
    unknown = [repr(key) for key in keys if key not in known]
    if missing:
        refuse_value("MHA-ROTARY-16", f"`scaling` must hold {', '.join(missing)}, received {short_repr(dict(keys))}.")
    if unknown:
        refuse_type(
            "MHA-ROTARY-16",
            f"`scaling` must hold only {', '.join(known[: -len(WITHOUT_EFFECT)])} for this method, "
            f"received {', '.join(unknown)}.",
        )


def _joined(keys: Mapping[str, Any], outside: Mapping[str, Any]) -> dict[str, Any]:
    """Join the dictionary with the arguments of the call, which must not contradict it."""
    for key, value in outside.items():
        held = keys.get(key)
        if value is not None and held is not None and value is not held and not are_equal_numbers(value, held):
            label = "base" if key == "rope_theta" else key
            refuse = refuse_value if is_number(plain(value)) else refuse_type
            refuse(
                "MHA-ROTARY-16",
                f"`{label}` must be {key} of `scaling`, {short_repr(held)}, or None, received {short_repr(value)}.",
            )
    return {key: keys.get(key) if value is None else value for key, value in outside.items()} | dict(keys)


def _checked_dim(dim: object) -> int:
    size = check_integer("dim", dim, 2, "MHA-ROTARY-16")
    if size > LARGEST_DIM:
        refuse_value("MHA-ROTARY-16", f"`dim` must be dim<={LARGEST_DIM}, received dim={short_repr(size)}.")
    return size


def _length(seq_len: object) -> int | None:
    return None if seq_len is None else min(check_integer("seq_len", seq_len, 0, "MHA-ROTARY-16"), sys.maxsize)
