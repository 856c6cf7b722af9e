"""The layer of PyTorch as a module: compared with a formula; state, compilation, dropout and errors."""

from __future__ import annotations

import copy
import math
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch
from support.comparisons import assert_equal, assert_near, assert_same
from support.layers import BATCH, CROSS, KV_HEADS, LENGTH, QK_DIM, assert_drawn_as_in_the_paper
from support.torch_world import sized, tokens, with_gradients
from torch.func import functional_call

import mha_spec
from mha_spec import ArgumentTypeError, ArgumentValueError, PagedKVCache, reference
from mha_spec.parameters import AXES, REQUIRED
from mha_spec_torch import MultiHeadAttention
from mha_spec_torch import layer as functions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor


def rotated(x: Tensor, interleaved: bool) -> Tensor:
    """Rotate each pair, as a complex number, by its position."""
    pairs = x.shape[-1] // 2
    order = torch.arange(2 * pairs).reshape(pairs, 2) if interleaved else torch.arange(2 * pairs).reshape(2, pairs).T
    angles = torch.arange(x.shape[2])[:, None] * 10000.0 ** (-torch.arange(pairs, dtype=x.dtype) / pairs)
    numbers = torch.complex(x[..., order[:, 0]], x[..., order[:, 1]]) * torch.polar(torch.ones_like(angles), angles)
    return torch.stack([numbers.real, numbers.imag], -1).flatten(-2)[..., order.flatten().argsort()]


def formula(
    params: Mapping[str, Tensor], query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, interleaved: bool | None
) -> Tensor:
    """Compute the layer by einsum, with groups as an axis and weights of 0 at hidden pairs."""
    q, k, v = (
        torch.einsum("ble,ehd->bhld", x, params[f"w_{name}"]) + params[f"b_{name}"][:, None]
        for name, x in (("q", query), ("k", key), ("v", value))
    )
    if "q_norm" in params:
        q, k = (
            x * params[f"{name}_norm"] / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            for name, x in (("q", q), ("k", k))
        )
    if interleaved is not None:
        q, k = rotated(q, interleaved), rotated(k, interleaved)
    scores = torch.einsum("bgrqd,bgkd->bgrqk", q.unflatten(1, (KV_HEADS, -1)), k) / math.sqrt(QK_DIM)
    exponentials = torch.where(hidden, 0.0, torch.exp(scores))
    weights = exponentials / exponentials.sum(-1, keepdim=True)
    heads = torch.einsum("bgrqk,bgkd->bgrqd", weights, v).flatten(1, 2)
    return torch.einsum("bhqd,hdo->bqo", heads, params["w_o"]) + params["b_o"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rotary", [None, {}, {"interleaved": True}], ids=["plain", "halves", "interleaved"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_output_and_gradients_equal_the_formula(qk_norm: bool, rotary: dict[str, bool] | None, causal: bool) -> None:
    def ours(dtype: str) -> list[Tensor]:
        layer, x = sized(dtype, qk_norm=qk_norm, rotary=rotary), tokens(dtype=dtype).requires_grad_()
        return with_gradients([layer(x, causal=causal)], [x, *layer.parameters()])

    layer, x = sized(qk_norm=qk_norm, rotary=rotary), tokens().requires_grad_()
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) if causal else torch.tensor(False)
    interleaved = None if rotary is None else rotary.get("interleaved", False)
    expected = formula(layer.params, x, x, x, hidden, interleaved)
    assert_same(ours, with_gradients([expected], [x, *layer.parameters()]))


def test_products_in_parts_equal_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FEW_ROWS": BATCH * LENGTH, "PARTS": 7, "LEAST": 1}.items():
        monkeypatch.setattr(functions, name, value)
    assert products_in_parts(monkeypatch, sized(), tokens()) == 3
    test_output_and_gradients_equal_the_formula(qk_norm=False, rotary=None, causal=False)


@pytest.mark.parametrize(
    ("count", "embed", "dtype", "expected"),
    [
        (16, 256, "float32", 4),
        (16, 256, "float64", 4),
        (16, 256, "bfloat16", 0),
        (17, 256, "float32", 0),
        (16, 260, "float32", 0),
        (16, 248, "float32", 0),
    ],
)
def test_few_tokens_and_a_large_matrix_are_multiplied_in_parts(
    count: int, embed: int, dtype: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = MultiHeadAttention(embed, 4, dtype=getattr(torch, dtype))
    assert products_in_parts(monkeypatch, layer, tokens(count, embed, dtype=dtype)[:1]) == expected


def products_in_parts(monkeypatch: pytest.MonkeyPatch, layer: MultiHeadAttention, x: Tensor) -> int:
    """Return the number of products in a call that are computed in parts."""
    products: list[Tensor] = []
    with monkeypatch.context() as patched:
        patched.setattr(functions, "_in_parts", lambda *x: products.append(in_parts(*x)) or products[-1])
        layer(x)
    return len(products)


in_parts = functions._in_parts


def test_cross_attention_equals_the_formula() -> None:
    def inputs(dtype: str) -> list[Tensor]:
        return [tokens(*size, dtype=dtype).requires_grad_() for size in ((), (8, 3), (8, 17))]

    def ours(dtype: str) -> list[Tensor]:
        layer, x = sized(dtype, **CROSS), inputs(dtype)
        return with_gradients([layer(*x, kv_lengths=[5, 8])], [*x, *layer.parameters()])

    layer, x = sized(**CROSS), inputs("float64")
    hidden = (torch.arange(8) >= torch.tensor([5, 8])[:, None])[:, None, None, None]
    expected = formula(layer.params, x[0], x[1], x[2], hidden, None)
    assert_same(ours, with_gradients([expected], [*x, *layer.parameters()]))


@pytest.mark.usefixtures("quiet")
def test_the_module_and_its_gradients_compile_for_every_length() -> None:
    torch.compiler.reset()
    eager = {dtype: sized(dtype, rotary={}) for dtype in ("float64", "float32")}
    compiled = {
        dtype: torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True) for dtype, layer in eager.items()
    }
    for length in (LENGTH, 17):

        def ours(dtype: str, called: Mapping[str, Any] = compiled, length: int = length) -> list[Tensor]:
            x = tokens(length, dtype=dtype).requires_grad_()
            return with_gradients([called[dtype](x)], [x, *eager[dtype].parameters()])

        assert_same(ours, ours("float64", eager))


def test_a_module_equals_its_function() -> None:
    layer = sized(qk_norm=True, rotary={"base": 5.0}, norm_epsilon=0.5)
    x, key = tokens(), tokens(5, seed=7)
    keywords: dict[str, Any] = {"q_offset": 3, "causal": True}
    options = {"rotary": {"base": 5.0}, "norm_epsilon": 0.5, **keywords}
    assert_equal(layer(x, key, **keywords), mha_spec.multi_head_attention(x, key, key, layer.params, **options))
    expected = mha_spec.multi_head_attention_weights(x, key, layer.params, **options)
    assert_equal(layer.attention_weights(x, key, **keywords), expected)
    assert_equal(layer(x), layer(x, x, x))


def test_state_is_saved_and_loaded() -> None:
    layer, other = sized(qk_norm=True), sized(qk_norm=True)
    other.reset_parameters()
    assert not torch.equal(other(tokens()), layer(tokens()))
    assert list(layer.state_dict()) == list(layer.settings.shapes())
    other.load_state_dict(layer.state_dict(), strict=True)
    assert_equal(other(tokens()), layer(tokens()))
    assert list(sized(bias=False).state_dict()) == ["w_q", "w_k", "w_v", "w_o"]


def test_copies_share_no_parameters_and_functional_call_replaces_them() -> None:
    layer, x = sized(), tokens()
    copied, before = copy.deepcopy(layer), layer(x)
    with torch.no_grad():
        copied.b_o += 1
    assert_equal(layer(x), before)
    called = functional_call(layer, dict(copied.named_parameters()), (x,))
    assert_equal(called, copied(x))
    assert not torch.equal(called, before)


def test_stacked_layers_under_vmap() -> None:
    layers, x = [sized(), sized()], tokens()
    with torch.no_grad():
        layers[1].w_v *= 2
    stacked, _ = torch.func.stack_module_state(layers)
    mapped = torch.func.vmap(lambda params: functional_call(layers[0], params, (x,)))(stacked)
    assert_near(list(mapped), [layer(x) for layer in layers])


def test_weights_are_initialised_as_in_the_paper() -> None:
    torch.manual_seed(0)
    layer = MultiHeadAttention(64, 4, qk_dim=24, out=96, qk_norm=True)
    assert_drawn_as_in_the_paper({name: parameter.detach().numpy() for name, parameter in layer.params.items()})
    before = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert not torch.equal(layer.w_q, before["w_q"])


def test_dropout_applies_in_training() -> None:
    layer, x = sized(dropout_rate=0.5), tokens()
    assert not torch.equal(layer(x), layer(x))
    drawn = [layer(x, dropout_key=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert_equal(*drawn)
    assert_equal(layer(x, dropout_rate=0.0), layer.eval()(x))
    assert_equal(layer(x), layer(x))


def test_factory_arguments_and_repr() -> None:
    layer = MultiHeadAttention(24, 4, kv_heads=2, rotary={}, dropout_rate=0.1, device="meta", dtype=torch.bfloat16)
    assert all((x.device.type, x.dtype) == ("meta", torch.bfloat16) for x in layer.parameters())
    assert repr(layer) == "MultiHeadAttention(embed=24, heads=4, kv_heads=2, rotary={}, dropout_rate=0.1)"
    assert layer.to_empty(device="cpu")(torch.zeros(2, 3, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("quiet")
def test_results_have_the_type_of_autocast(compiled: bool) -> None:
    layer, x = sized("float32", rotary={}), tokens(dtype="float32")
    torch.compiler.reset()
    called = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    halved = copy.deepcopy(layer).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output, (step, cache) = called(x), called(x, cache=layer.empty_cache(BATCH, LENGTH))
    assert output.dtype == step.dtype == cache.key.dtype == torch.bfloat16
    assert_equal(output, halved(x.bfloat16()))
    _, *grads = with_gradients([output], layer.parameters())
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in grads)


# Errors.

REFUSED: dict[str, tuple[Callable[[MultiHeadAttention, Tensor], object], type[Exception], str]] = {
    "unknown option": (lambda layer, x: layer(x, is_causal=True), ArgumentTypeError, "Did you mean `causal`"),
    "rank": (lambda layer, x: layer(x[0]), ArgumentValueError, "rank 3"),
    "embed": (lambda layer, x: layer(x[..., 1:]), ArgumentValueError, "w_q"),
    "dtype": (lambda layer, x: layer(x.float()), ArgumentTypeError, "dtype=float32"),
    "another library": (lambda layer, x: layer(x, x.detach().numpy()), ArgumentTypeError, "numpy"),
    "overflow": (lambda layer, x: layer(x, cache=layer.empty_cache(BATCH, 7)), ArgumentValueError, "capacity=7"),
    "batch": (lambda layer, x: layer(x, cache=layer.empty_cache(3, LENGTH)), ArgumentValueError, "cache.key"),
    "ambiguous": (lambda layer, x: layer(x, x[:, 1:], causal=True), ArgumentValueError, "q_offset"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_are_raised_by_the_checks(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call(sized(), tokens())


def test_the_constructor_checks_the_sizes() -> None:
    with pytest.raises(ArgumentValueError, match="multiple of heads=4"):
        MultiHeadAttention(7, 4)
    with pytest.raises(ArgumentValueError, match="rotary_dim"):
        MultiHeadAttention(9, 3, rotary={})


@pytest.mark.parametrize("device", ["nope", "", "cuda:101", -1, 1.5, torch])
def test_the_constructor_refuses_a_device_without_tensors(device: Any) -> None:
    error = ArgumentTypeError if device in (1.5, torch) else ArgumentValueError
    with pytest.raises(error, match=r"`device` must be None or a device of torch.*\[MHA-ARG-4\]"):
        MultiHeadAttention(7, 3, qk_dim=4, device=device)


@pytest.mark.parametrize("heads", [numpy.int64(5), numpy.uint8(5)])
def test_a_number_of_heads_may_be_a_scalar_of_numpy(heads: Any) -> None:
    assert_equal(functions.alibi_bias(heads, 3, 3), functions.alibi_bias(5, 3, 3))


@pytest.mark.parametrize("kind", [torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer])
def test_frequencies_without_a_shape_are_refused(kind: type[Any]) -> None:
    with pytest.raises(ArgumentTypeError, match=r"`frequencies` must be .*Uninitialized.*\[MHA-ROTARY-7\]"):
        functions.rotary_embedding(torch.ones(2, 5, 3, 4), torch.arange(3), frequencies=kind())


ARRAY = numpy.ones((2, 5, 3, 4), dtype="float32")
FOREIGN: dict[str, Callable[[], Any]] = {
    "query": lambda: functions.multi_head_attention(ARRAY[0], ARRAY[0], ARRAY[0], {}),
    "x": lambda: functions.rotary_embedding(ARRAY, numpy.arange(3)),
    "slopes": lambda: functions.alibi_bias(ARRAY[0, :, 0, 0], 3, 3),
    "like": lambda: functions.empty_cache(2, 5, 7, 4, like=ARRAY),
    "key": lambda: functions.append_cache(reference.empty_cache(2, 5, 7, 4, like=ARRAY), ARRAY, ARRAY),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_arrays_of_another_library_are_refused(name: str) -> None:
    with pytest.raises(ArgumentTypeError, match=f"`{name}` must be an array of torch"):
        FOREIGN[name]()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_block_table_without_a_shape_is_refused() -> None:
    table = torch.nested.nested_tensor([torch.tensor([0]), torch.tensor([1, 2])])
    with pytest.raises(ArgumentTypeError, match="`block_table` must be an array"):
        PagedKVCache.empty(table, 3, 2, 1, 4, like=torch.ones(1))


@pytest.mark.parametrize("kind", [dict, MappingProxyType])
@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("name", ["b_q", "b_k", "b_v", "b_o", "q_norm", "k_joint_norm"])
def test_a_compiled_layer_reads_a_parameter_that_earlier_calls_do_not_have(
    name: str, by_keyword: bool, kind: type
) -> None:
    sizes = {"embed": 5, "k_embed": 5, "v_embed": 5, "heads": 2, "kv_heads": 2, "qk_dim": 3, "v_dim": 7, "out": 11}
    drawn = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    params = {label: drawn([sizes[axis] for axis in AXES[label]]) for label in (*REQUIRED, name)}
    without = {label: array for label, array in params.items() if label != name}
    x = drawn(2, 13, 5)

    def call(params: Any) -> Any:
        operands, keywords = ((x, x, x), {"params": params}) if by_keyword else ((x, x, x, params), {})
        return functions.multi_head_attention(*operands, **keywords, causal=True)

    torch.compiler.reset()
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    for arrays in (without, params, without):
        assert_equal(compiled(kind(arrays)), call(arrays))
