"""The laws of a target: kept bit by bit, within the allowance, or broken; they do not count for the verdict."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy
import pytest
from support.layouts import Inside, Kernel, claims, keys_of, small_cases

from mha_spec.steps import Steps
from mha_spec_conformance.asking.calls import function_over
from mha_spec_conformance.asking.selection import Selection, asks
from mha_spec_conformance.asking.worker import answer
from mha_spec_conformance.judging.result import Result
from mha_spec_conformance.running.laws import LAWS, PAGES, Law, laws_of
from mha_spec_conformance.suite.functions import FUNCTIONS
from mha_spec_conformance.targets.claims import Claims
from mha_spec_conformance.targets.loading import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mha_spec_conformance.asking.question import Answer, Question
    from mha_spec_conformance.suite.cases import Suite

CALLS = ("attention", "multi_head_attention")
RIGHT = function_over(Steps(), "attention")


class InThisProcess:
    """A source whose target is called in this process."""

    def __init__(self, attention: Callable[..., object]) -> None:
        self.claims = Claims("mine", {name: FUNCTIONS[name].keywords for name in CALLS}, ("float32",))
        functions = {"multi_head_attention": function_over(Steps(), "multi_head_attention"), "attention": attention}
        self.target = Target(functions, self.claims)

    def answers(self, *groups: Iterable[Question]) -> Iterator[tuple[Question, Answer]]:
        for group in groups:
            for question in group:
                yield question, answer(self.target, question)


def laws(suite: Suite, attention: Callable[..., object]) -> dict[str, Law]:
    source = InThisProcess(attention)
    asked = asks(suite.cases, source.claims, Selection())
    return {law.name: law for law in laws_of(source, [Result(ask, "pass") for ask in asked])}


@pytest.fixture(scope="module")
def kept(suite: Suite) -> dict[str, Law]:
    return laws(suite, RIGHT)


@pytest.mark.parametrize("name", sorted(LAWS.keys() - {PAGES}))
def test_the_reference_keeps_every_law(kept: dict[str, Law], name: str) -> None:
    assert kept[name].asked >= 2
    assert not kept[name].broken


def test_hidden_and_later_data_change_no_bit_of_the_reference(kept: dict[str, Law]) -> None:
    for name in ("other numbers in hidden keys and values", "other numbers in keys and values of later rows"):
        assert kept[name].same == kept[name].asked


def first(change: Callable[[SimpleNamespace], numpy.ndarray]) -> Callable[..., object]:
    """Change the output of the reference."""

    def attention(query: numpy.ndarray, key: numpy.ndarray, value: numpy.ndarray, **options: object) -> object:
        results = RIGHT(query, key, value, **options)
        output, *others = results if isinstance(results, tuple) else (results,)
        changed = change(SimpleNamespace(output=numpy.asarray(output), query=query, value=value)).astype(output.dtype)
        return (changed, *others) if others else changed

    return attention


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("another batch size", lambda a: a.output * (1 + len(a.query))),
        ("another place in the batch", lambda a: a.output * numpy.arange(2, 2 + len(a.query)).reshape(-1, 1, 1, 1)),
        ("other numbers in hidden keys and values", lambda a: a.output + a.value.mean()),
        ("other numbers in keys and values of later rows", lambda a: a.output + a.value.mean()),
        ("decode = prefill", lambda a: a.output * a.query.shape[2]),
        ("split and merge = whole", lambda a: a.output * a.value.shape[2]),
    ],
)
def test_broken_law_is_reported(suite: Suite, name: str, change: Callable[..., numpy.ndarray]) -> None:
    law = laws(suite, first(change))[name]
    assert len(law.broken) == law.asked > 0


def test_answers_of_other_bits_are_close(suite: Suite) -> None:
    def nudged(a: SimpleNamespace) -> numpy.ndarray:
        return a.output if len(a.query) > 1 else numpy.nextafter(a.output, a.output + 1)

    law = laws(suite, first(nudged))["another batch size"]
    assert law.close == law.asked > 0


def test_failures_and_sampled_cases_are_not_asked(suite: Suite) -> None:
    source = InThisProcess(RIGHT)
    asked = asks(suite.cases, source.claims, Selection())
    assert laws_of(source, [replace(Result(ask, "pass"), outcome="fail") for ask in asked]) == ()


def of_pages(suite: Suite, kernel: Kernel) -> dict[str, Law]:
    """Ask a kernel that takes keys in pages of few tokens."""
    source = Inside(kernel.functions, claims("paged", block_size=2))
    asked = asks(small_cases(suite).cases, source.claims, Selection(only=("attention/*",)))
    return {law.name: law for law in laws_of(source, [Result(ask, "pass") for ask in asked])}


def test_a_kernel_reads_the_same_keys_from_other_pages(suite: Suite) -> None:
    law = of_pages(suite, Kernel())[PAGES]
    assert law.same == law.asked == 4


def test_a_kernel_whose_result_depends_on_the_page_table_is_reported(suite: Suite) -> None:
    def in_memory_order(length: int, table: numpy.ndarray, block_size: int) -> list[tuple[int, slice]]:
        return sorted(keys_of(length, table, block_size))

    law = of_pages(suite, Kernel(pages=in_memory_order))[PAGES]
    assert law.same < law.asked
    # The keys of a row that sees all of them may come in any order, but the bits of a sum depend on it.
    assert law.close + len(law.broken) > 0


def test_no_law_of_pages_without_pages(kept: dict[str, Law]) -> None:
    assert PAGES not in kept
