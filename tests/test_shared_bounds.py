"""The bounds of a case: one evaluation serves all dtypes, and the rows of a golden are bounded without the others."""

from __future__ import annotations

import numpy
import pytest

from mha_spec_conformance.judging.bounds import SharedBounds, bounds, precision
from mha_spec_conformance.judging.compare import golden_rows
from mha_spec_conformance.suite.cases import Case, Suite, load

ROUNDOFF_OF_PRODUCTS = 2.0**-40
"""Sums of products depend on the shape of the product, by a few roundings of float64."""


@pytest.fixture(scope="module")
def suite() -> Suite:
    """The goldens of this package."""
    return load()


def test_an_evaluation_in_float64_serves_every_dtype_of_a_case(suite: Suite) -> None:
    for case in chosen(suite):
        shared = SharedBounds()
        for dtype in case.dtypes:
            run = precision(dtype)
            alone = bounds(case.function, case.inputs(dtype), case.options, rows=case.sampled_rows)
            assert_same(shared.of(case, dtype).allowances(run), alone.allowances(run), case.id)
            assert_same(shared.of(case, dtype).deviations(run), alone.deviations(run), case.id)


def chosen(suite: Suite) -> list[Case]:
    """Return a case of several dtypes with each kind of bounds, and with operands whose dtypes matter."""
    cases: dict[tuple[object, ...], Case] = {}
    for case in suite.cases:
        small = all(numpy.prod(shape) < 2**14 for shape in case.input_shapes.values())
        if case.expected and len(case.dtypes) > 1 and small:
            names = frozenset(case.input_names) & {"bias", "sinks", "grad_lse"}
            cases.setdefault((case.function, names, case.sampled_rows is None), case)
    return list(cases.values())


def assert_same(received: dict[str, numpy.ndarray], expected: dict[str, numpy.ndarray], name: str) -> None:
    """Require the same arrays by the same names."""
    assert received.keys() == expected.keys()
    for output, array in expected.items():
        assert numpy.array_equal(received[output], array, equal_nan=True), (name, output)


def test_rows_have_the_bounds_that_they_have_in_the_whole_call(suite: Suite) -> None:
    sampled = [case for case in suite.cases if case.id.startswith("attention/") and case.sampled_rows is not None]
    small = [case for case in sampled if numpy.prod(case.shape_of("query")[:3]) * case.shape_of("key")[2] < 2**15]
    assert len(small) > 20
    for case in small[::8]:
        run = precision(case.dtypes[0])
        arguments = case.function, case.inputs(case.dtypes[0]), case.options
        whole, of_rows = bounds(*arguments), bounds(*arguments, rows=case.sampled_rows)
        for name, expected in case.expected.items():
            for method in ("allowances", "deviations"):
                received, wanted = (golden_rows(getattr(b, method)(run)[name], expected) for b in (of_rows, whole))
                assert numpy.allclose(received, wanted, rtol=ROUNDOFF_OF_PRODUCTS, atol=0), (case.id, name, method)
