"""Random dropout of mha_spec_torch: statistics, generators, gradients, compiled calls and transforms."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.comparisons import assert_near
from support.torch_world import cut_into_tasks, operands
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mha_spec_torch
from mha_spec.errors import ArgumentTypeError, ArgumentValueError
from mha_spec_torch import tasks

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

attention: Callable[..., Any] = mha_spec_torch.attention
GENERATOR_SEED = 20261123


def test_dropout_keeps_pairs_at_its_rate() -> None:
    """The two-sided bound of 6.2 standard deviations of a binomial has a false-alarm probability below 1e-9."""
    pairs = 4 * 512 * 512
    for rate in (0.1, 0.5, 0.9):
        query, key = torch.zeros(1, 4, 512, 8), torch.zeros(1, 4, 512, 8)
        value = torch.eye(512).expand(1, 4, 512, 512)
        output = attention(
            query, key, value, dropout_rate=rate, dropout_key=torch.Generator().manual_seed(GENERATOR_SEED)
        )
        kept = int(torch.count_nonzero(output))
        assert abs(kept - pairs * (1 - rate)) <= 6.2 * math.sqrt(pairs * rate * (1 - rate))
        torch.testing.assert_close(output[output != 0].unique(), torch.tensor([1 / 512 / (1 - rate)]))


def test_dropout_depends_on_its_generator() -> None:
    def draw(seed: int) -> Tensor:
        return attention(*arguments, dropout_rate=0.5, dropout_key=torch.Generator().manual_seed(seed))

    torch.manual_seed(GENERATOR_SEED)
    arguments = operands()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    with pytest.raises(ArgumentTypeError, match=r"dropout_key=3"):
        attention(*arguments, dropout_rate=0.5, dropout_key=3)


def kept(shape: tuple[int, int, int, int], rate: float, **options: Any) -> Tensor:
    """Return which pairs random dropout keeps: each value is a unit vector, so that the output shows them."""
    batch, heads, q_len, kv_len = shape
    query, key = torch.zeros(batch, heads, q_len, 1), torch.zeros(batch, heads, kv_len, 1)
    value = torch.eye(kv_len).expand(batch, heads, kv_len, kv_len)
    return attention(query, key, value, dropout_rate=rate, **options) != 0


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_pairs_are_kept_independently(rate: float) -> None:
    """Check products of neighbours and squared sums of lines to 6.6 standard deviations each, below 1e-10."""
    centred = kept((2, 3, 256, 512), rate, dropout_key=torch.Generator().manual_seed(GENERATOR_SEED)).double()
    centred = (centred - (1 - rate)) / math.sqrt(rate * (1 - rate))
    for axis in range(4):
        length = centred.shape[axis]
        products = centred.narrow(axis, 1, length - 1) * centred.narrow(axis, 0, length - 1)
        assert abs(float(products.sum())) <= 6.6 * math.sqrt(products.numel())
    corners = centred[..., 1:, 1:] * centred[..., 1:, :-1] * centred[..., :-1, 1:] * centred[..., :-1, :-1]
    assert abs(float(corners.sum())) <= 6.6 * math.sqrt(corners.numel())
    for axis in (2, 3):
        sums = centred.sum(axis) / math.sqrt(centred.shape[axis])
        excess = (1 - 6 * rate * (1 - rate)) / (rate * (1 - rate)) / centred.shape[axis]
        assert abs(float((sums**2 - 1).sum())) <= 6.6 * math.sqrt((2 + excess) * sums.numel())


def test_dropout_does_not_depend_on_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(**options: Any) -> Tensor:
        return kept((2, 3, 37, 41), 0.4, dropout_key=torch.Generator().manual_seed(3), q_offset=0, **options)

    whole, part = draw(), draw(window=(5, 3))
    cut_into_tasks(monkeypatch)
    distance = torch.arange(41) - torch.arange(37)[:, None]
    assert torch.equal(draw(), whole)
    assert torch.equal(draw(window=(5, 3)), part)
    assert torch.equal(part, whole & (distance >= -5) & (distance <= 3))


def test_a_rate_of_0_draws_nothing() -> None:
    arguments, generator = operands(), torch.Generator().manual_seed(GENERATOR_SEED)
    states = generator.get_state(), torch.get_rng_state()
    assert torch.equal(attention(*arguments, dropout_rate=0.0, dropout_key=generator), attention(*arguments))
    attention(*arguments, dropout_rate=0.0)
    assert torch.equal(generator.get_state(), states[0])
    assert torch.equal(torch.get_rng_state(), states[1])


def test_without_a_generator_dropout_uses_that_of_torch() -> None:
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return kept((1, 2, 17, 19), 0.5)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1), kept((1, 2, 17, 19), 0.5))


def test_no_tensor_has_the_size_of_a_mask() -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **kwargs or {})
            self.numel = max(
                self.numel, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)), 0
            )
            return result

    query, key, value = (torch.randn(1, 2, 3001, 8, requires_grad=True) for _ in range(3))
    with Largest() as largest:
        attention(query, key, value, dropout_rate=0.1).sum().backward()
    assert 0 < largest.numel <= tasks.SCORES


def test_gradients_use_the_mask_of_the_forward() -> None:
    query, key, value = (torch.randn(1, 2, 24, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def call(*operands: Tensor) -> Tensor:
        return attention(*operands, dropout_rate=0.3, dropout_key=torch.Generator().manual_seed(5))

    assert torch.autograd.gradcheck(call, (query, key, value), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (query, key, value), fast_mode=True)


@pytest.mark.usefixtures("quiet")
def test_dropout_in_a_compiled_call() -> None:
    """The output is linear in the values: if forward and backward have the same mask, both sums are equal."""
    leaves = [operand.double().requires_grad_() for operand in operands()]
    torch.compiler.reset()
    compiled = torch.compile(partial(attention, dropout_rate=0.5), fullgraph=True, backend="aot_eager")
    outputs = [compiled(*leaves) for _ in range(2)]
    assert not torch.equal(*outputs)
    for output in outputs:
        grad_output = torch.randn_like(output)
        (gradient,) = torch.autograd.grad(output, leaves[2], grad_output)
        assert_near((gradient * leaves[2]).sum(), (output * grad_output).sum())


def test_dropout_under_a_transform() -> None:
    query, key, value = (operand.double()[:, None] for operand in operands())

    def call(query: Tensor, seed: int = 5) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return attention(query, key[0], value[0], dropout_rate=0.5, dropout_key=generator)

    twice = query[:1].expand(2, *query.shape[1:])
    same = torch.func.vmap(call, randomness="same")(twice)
    assert torch.equal(same[0], same[1])
    different = torch.func.vmap(call, randomness="different")(twice)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(ArgumentValueError, match=r"`dropout_rate`.*randomness='different'"):
        torch.func.vmap(call)(twice)
    leaf = query[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(call(leaf).square().sum(), leaf)
    assert_near(torch.func.grad(lambda query: call(query).square().sum())(query[0]), expected)
