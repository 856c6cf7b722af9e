"""The layer as an object: its settings, and methods that pass them to the functions of the layer.

A backend's `MultiHeadAttention` adds the parts that depend on its framework: storage of parameters and training mode.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, TypeVar

from .arguments import Options, WeightOptions
from .arrays import FLOATING, dtype_name
from .checks import check_rate
from .errors import refuse_type, refuse_value
from .layer_checks import check_epsilon
from .parameters import AXES, REQUIRED
from .rotary_checks import Rotary, check_rotary
from .scalars import check_count, check_flag, check_size, short_repr

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import ModuleType
    from typing import Unpack

    from .arrays import Array
    from .cache import AnyCache, KVCache

__all__ = [
    "CallOptions",
    "CallWeightOptions",
    "LayerObject",
    "LayerOptions",
    "LayerSettings",
    "check_parameter_dtype",
    "expand_layer_options",
]


class CallWeightOptions(WeightOptions, total=False):
    """The options of a call that returns weights."""

    positions: Array | Sequence[Any] | None
    """The positions of queries and new keys in the rotation; by default they are counted (MHA-LAYER-7)."""


class CallOptions(Options, total=False):
    """The options of a call of a layer."""

    positions: Array | Sequence[Any] | None
    """The positions of queries and new keys in the rotation; by default they are counted (MHA-LAYER-7)."""


class LayerOptions(TypedDict, total=False):
    """The options of a layer, except embed and heads, which are positional."""

    kv_heads: int | None
    """heads by default (MHA-HEAD-2)."""
    qk_dim: int | None
    """embed // heads by default."""
    v_dim: int | None
    """qk_dim by default."""
    k_embed: int | None
    """embed by default (MHA-LAYER-3)."""
    v_embed: int | None
    """embed by default (MHA-LAYER-3)."""
    out: int | None
    """embed by default."""
    bias: bool
    """True adds b_q, b_k, b_v and b_o; the default (MHA-PROJ-2, MHA-PROJ-3)."""
    qk_norm: bool | str
    """True adds q_norm and k_norm, "joint" q_joint_norm and k_joint_norm; False by default (MHA-NORM-1, MHA-NORM-3)."""
    rotary: Mapping[str, Any] | None
    """The options of rotary_embedding, {} for its defaults; None, the default, means no rotation (MHA-ROTARY-4)."""
    norm_epsilon: float
    """1e-6 by default (MHA-NORM-1)."""
    dropout_rate: float
    """0 by default; applies in training only (MHA-DROP-1)."""


@dataclass(frozen=True)
class LayerSettings:
    """The sizes of a layer, its optional parameters, and the options of its calls."""

    embed: int
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    k_embed: int
    v_embed: int
    out: int
    bias: bool = True
    qk_norm: bool | str = False
    rotary: Rotary | None = None
    norm_epsilon: float = 1e-6
    dropout_rate: float = 0.0

    @classmethod
    def of(cls, embed: int, heads: int, **options: Unpack[LayerOptions]) -> LayerSettings:
        """Make settings from options and their defaults; see `LayerOptions`.

        Raises:
            ArgumentValueError, ArgumentTypeError: A size is not an integer >= 1, heads is not a multiple of kv_heads
                or, without qk_dim, does not divide embed, or another option is unknown or out of its range.
        """
        every = _checked({"embed": embed, "heads": heads, **options})
        embed, heads = every.pop("embed"), every.pop("heads")
        chosen = {name: value for name, value in every.items() if value is not None}
        settings = _default_sizes(embed, heads, chosen.get("qk_dim") or _even_share(embed, heads)) | chosen
        if "rotary" in chosen:
            settings["rotary"] = check_rotary(chosen["rotary"], settings["qk_dim"])
        layer = cls(embed, heads, **settings)
        for name in layer.shapes():
            check_count({axis: getattr(layer, axis) for axis in AXES[name]}, "MHA-PROJ-4")
        if heads % layer.kv_heads:
            refuse_value(
                "MHA-HEAD-2", f"`heads` must be a multiple of kv_heads={layer.kv_heads}, received heads={heads}."
            )
        return layer

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter of the layer by its name."""
        names = REQUIRED + (("b_q", "b_k", "b_v", "b_o") if self.bias else ())
        names += NORMS[self.qk_norm]
        return {name: tuple(getattr(self, axis) for axis in AXES[name]) for name in names}

    def initial_bound(self, name: str) -> float | None:
        """Return the bound b of Xavier's uniform distribution on [-b, b] for a weight; None for a bias or a gain.

        b = sqrt(6 / (fan_in + fan_out)) for the matrix (in, heads * size) of the weight, as in the code of Vaswani et
        al. Biases start at 0, gains at 1.
        """
        if name not in REQUIRED:
            return None
        shape = self.shapes()[name]
        fans = (shape[0] * shape[1], shape[2]) if name == "w_o" else (shape[0], shape[1] * shape[2])
        return math.sqrt(6 / sum(fans))

    @property
    def arguments(self) -> dict[str, Any]:
        """The keywords that make these settings, with embed and heads, as plain data."""
        return asdict(self) | {"rotary": None if self.rotary is None else self.rotary.non_defaults()}

    def __str__(self) -> str:
        """Show the keywords that differ from the defaults: `embed=10, heads=5, kv_heads=1`."""
        share = self.embed // self.heads if self.embed % self.heads == 0 else None
        default = {field.name: field.default for field in fields(self)}
        default |= _default_sizes(self.embed, self.heads, share) | {"v_dim": self.qk_dim}
        return ", ".join(f"{name}={value}" for name, value in self.arguments.items() if value != default[name])


JOINT = "joint"
"""The value of qk_norm for a norm over all heads."""

NORMS = {False: (), True: ("q_norm", "k_norm"), JOINT: ("q_joint_norm", "k_joint_norm")}
"""The gains of a layer by its qk_norm."""

MAY_BE_NONE = ("kv_heads", "qk_dim", "v_dim", "k_embed", "v_embed", "out", "rotary")
"""The options for which None means the default."""


def _default_sizes(embed: int, heads: int, qk_dim: int | None) -> dict[str, Any]:
    sizes = {"kv_heads": heads, "qk_dim": qk_dim, "v_dim": qk_dim}
    return sizes | {"k_embed": embed, "v_embed": embed, "out": embed}


def _even_share(embed: int, heads: int) -> int:
    if embed % heads:
        refuse_value(
            "MHA-PROJ-4",
            f"`embed` must be a multiple of heads={heads}, received embed={embed}. Or pass qk_dim, the size of a head.",
        )
    return embed // heads


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Check each option, and return all with Python values for NumPy scalars."""
    known = [field.name for field in fields(LayerSettings)]
    for name in options:
        if name not in known:
            refuse_type("MHA-ARG-1", f"`{name}` is not an option of the layer, which has {', '.join(known)}.")
    return {name: _checked_option(name, value) for name, value in options.items()}


def _checked_option(name: str, value: Any) -> Any:
    if name == "rotary" or (value is None and name in MAY_BE_NONE):
        return value
    if name == "bias" or (name == "qk_norm" and not isinstance(value, str)):
        return check_flag(name, value, "MHA-PROJ-4")
    if name == "qk_norm":
        return _checked_norm(value)
    if name == "norm_epsilon":
        return check_epsilon(value)
    if name == "dropout_rate":
        return check_rate(value)
    return check_size(name, value, 1, "MHA-PROJ-4")


def _checked_norm(value: object) -> str:
    if value != JOINT:
        refuse_value("MHA-NORM-3", f'`qk_norm` must be True, False or "{JOINT}", received qk_norm={short_repr(value)}.')
    return JOINT


def check_parameter_dtype(dtype: object, empty: Callable[[Any], Array], label: str = "dtype") -> None:
    """Require the dtype of floating parameters; `empty` makes an array of it without elements (MHA-PROJ-4)."""
    try:
        name = dtype_name(empty(dtype))
    except (TypeError, ValueError):
        name = None
    if name not in FLOATING:
        refuse_type(
            "MHA-PROJ-4",
            f"`{label}` must be a dtype of {', '.join(FLOATING)}, received {label}={short_repr(dtype)} "
            f"of type {type(dtype).__name__}.",
        )


_Init = TypeVar("_Init", bound="Callable[..., None]")


def expand_layer_options(init: _Init) -> _Init:
    """Set the signature of an `__init__` to name every option of its `**options`, with the default."""
    signature = inspect.signature(init)
    default = {field.name: None if field.default is MISSING else field.default for field in fields(LayerSettings)}
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default[name])
        for name in LayerOptions.__annotations__
    ]
    named = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    vars(init)["__signature__"] = signature.replace(parameters=[*named, *options])
    return init


class LayerObject:
    """The methods of a layer that holds its parameters; see `mha_spec.reference.multi_head_attention`."""

    functions: ClassVar[ModuleType]
    """The module of the backend's functions of the layer."""
    settings: LayerSettings
    params: Any
    """The parameters by name, as `multi_head_attention` takes them."""

    def attend(
        self,
        query: Array,
        key: Array | None,
        value: Array | None,
        *,
        cache: AnyCache | None = None,
        **options: Unpack[CallOptions],
    ) -> Any:
        """Attend from the query to the key, by default the query, and its value, by default the key."""
        key = query if key is None else key
        value = key if value is None else value
        options = self._in_training(options)
        return self.functions.multi_head_attention(query, key, value, self.params, cache=cache, **self._all(options))

    def attention_weights(
        self,
        query: Array,
        key: Array | None = None,
        *,
        cache: KVCache | None = None,
        **options: Unpack[CallWeightOptions],
    ) -> Array:
        """Return the weights of every head, (batch, heads, q_len, kv_len), before dropout (MHA-LAYER-4)."""
        key = query if key is None else key
        return self.functions.multi_head_attention_weights(query, key, self.params, cache=cache, **self._all(options))

    def output_and_weights(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        *,
        cache: KVCache | None = None,
        **options: Unpack[CallOptions],
    ) -> tuple[Any, ...]:
        """Return the output, the weights before dropout and, with a cache, the new cache (MHA-LAYER-4)."""
        key = query if key is None else key
        value = key if value is None else value
        keywords = self._all(self._in_training(options))
        return self.functions.multi_head_attention_and_weights(query, key, value, self.params, cache=cache, **keywords)

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """Make a cache of this layer's sizes without tokens; `WindowKVCache(*cache)` holds the last ones."""
        sizes = self.settings
        return self.functions.empty_cache(batch, sizes.kv_heads, capacity, sizes.qk_dim, sizes.v_dim, like=self._like)

    def __repr__(self) -> str:
        """Show the settings that differ from the defaults."""
        return f"{type(self).__name__}({self.settings})"

    def _in_training(self, options: CallOptions) -> CallOptions:
        """Return the options of a call with the dropout of the layer's mode, training or evaluation."""
        return options

    def _all(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of a call and those of the settings."""
        rotary = self.settings.rotary
        fixed: dict[str, Any] = {
            "rotary": None if rotary is None else rotary.non_defaults(),
            "norm_epsilon": self.settings.norm_epsilon,
        }
        for name in fixed.keys() & options.keys():
            refuse_type(
                "MHA-ARG-1",
                f"`{name}` is a setting of the layer, {name}={fixed[name]!r}, received "
                f"{name}={short_repr(options[name])} in a call. Make another layer, or call multi_head_attention with "
                "its params.",
            )
        return {**fixed, **options}

    @property
    def _like(self) -> Array:
        """An array with the dtype and device of new caches."""
        return self.params["w_k"]
