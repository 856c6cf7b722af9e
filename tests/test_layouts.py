"""Layouts: the suite packs, pages, repeats and stacks; right kernels pass whole, and wrong ones are refused.

The two runs over all small cases take most of the time; fewer could leave out the case that a layout cannot express.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.layouts import Inside, Kernel, bounds_of, claims, keys_of, position_of, small_cases

from mha_spec import reference
from mha_spec_conformance.asking import files
from mha_spec_conformance.asking.layout_conversion import Conversion
from mha_spec_conformance.asking.protocol import answer_message, claims_from, claims_message, line_of, question_from
from mha_spec_conformance.asking.question import Answer, Further, Question
from mha_spec_conformance.asking.selection import Selection
from mha_spec_conformance.asking.worker import answer
from mha_spec_conformance.judging.judge import Judge
from mha_spec_conformance.running.offline import export, verify
from mha_spec_conformance.running.runner import NothingToJudge, Settings, judge_all, run
from mha_spec_conformance.targets.layouts import LAYOUTS
from mha_spec_conformance.targets.loading import Target, TargetError, load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mha_spec_conformance.running.run import Run
    from mha_spec_conformance.suite.cases import Suite
    from mha_spec_conformance.targets.claims import Claims

Array = numpy.ndarray


@pytest.fixture
def judged(suite: Suite) -> Callable[..., Run]:
    """Judge functions in this process."""

    def judged(
        functions: dict[str, Callable[..., object]], claims: Claims, *only: str, max_fail: int | None = None
    ) -> Run:
        settings = Settings(selection=Selection(only=only), max_fail=max_fail)
        return judge_all(Inside(functions, claims), Judge(claims), small_cases(suite), settings)

    return judged


@pytest.mark.parametrize("layout", ["thd", "paged"])
def test_a_right_kernel_passes_whole(judged: Callable[..., Run], layout: str) -> None:
    run = judged(Kernel().functions, claims(layout))
    assert run.verdict.startswith(f"conformant (layout {layout}) on core")
    assert {"q_lengths", "kv_lengths", "vjp", "lse", "causal", "window", "empty"} <= set(run.asked_features)
    assert {"mask", "bias", "weights", "segments", "dropout"} <= set(run.not_asked)
    assert run.status == 0
    assert len(run.deciding) > 300


def to_the_end(cu_seqlens: Array, tokens: int) -> list[slice]:
    """Let the last sequence end with the array."""
    *others, last = bounds_of(cu_seqlens, tokens)
    return [*others, slice(last.start, tokens)]


def of_all_sequences(cu_seqlens: Array, _: int) -> list[slice]:
    """Give every sequence the tokens of all."""
    return [slice(0, int(cu_seqlens[-1]))] * (len(cu_seqlens) - 1)


def even(cu_seqlens: Array, tokens: int) -> list[slice]:
    """Round every length down to an even number."""
    return [slice(x.start, x.start + (x.stop - x.start) // 2 * 2) for x in bounds_of(cu_seqlens, tokens)]


def padded(cu_seqlens: Array, tokens: int) -> list[slice]:
    """Let each sequence begin at a multiple of the largest length."""
    lengths = numpy.diff(cu_seqlens)
    starts = [n * int(max(lengths)) for n in range(len(lengths))]
    return [slice(start, min(tokens, start + int(length))) for start, length in zip(starts, lengths, strict=True)]


def without_empty(cu_seqlens: Array, tokens: int) -> list[slice]:
    """Put the sequences without tokens last."""
    return sorted(bounds_of(cu_seqlens, tokens), key=lambda x: x.stop == x.start)


def whole_pages(length: int, table: Array, block_size: int) -> list[tuple[int, slice]]:
    """Read every slot of the last page."""
    return [(block, slice(0, block_size)) for block, _ in keys_of(length, table, block_size)]


def one_more_page(length: int, table: Array, block_size: int) -> list[tuple[int, slice]]:
    """Read the page after the last page, where it exists, if the last page is full."""
    pages = keys_of(length, table, block_size)
    return [*pages, (int(table[len(pages)]), slice(0, 1))] if length % block_size == 0 else pages


def sorted_pages(length: int, table: Array, block_size: int) -> list[tuple[int, slice]]:
    """Read the blocks of a sequence in the order of memory."""
    return keys_of(length, numpy.sort(table[: -(-length // block_size)]), block_size)


def consecutive_pages(length: int, table: Array, block_size: int) -> list[tuple[int, slice]]:
    """Read the blocks that follow the first block."""
    return keys_of(length, table[0] + numpy.arange(len(table)), block_size)


def first_page_again(length: int, table: Array, block_size: int) -> list[tuple[int, slice]]:
    """Use the first entry of the table for every page."""
    return keys_of(length, table[:1].repeat(len(table)), block_size)


def tiled(query: Array, key: Array, value: Array, **options: Any) -> Any:
    """Let query head h read key/value head h % kv_heads."""
    heads = numpy.arange(query.shape[1]) % key.shape[1]
    return reference.attention(query, key[:, heads], value[:, heads], **options)


def touching(query: Array, key: Array, value: Array, **options: Any) -> Any:
    """Multiply what is past the end of a sequence by a weight of 0."""
    seen = ~numpy.isnan(key).any(axis=(0, 1, 3))
    output, lse = reference.attention(query, key[:, :, seen], value[:, :, seen], **options)
    return output + 0 * value.sum(axis=2, keepdims=True)[:, :1, :, :1], lse


WRONG_PACKED = {
    "positions run on": ("causal+", Kernel(position=lambda q, kv: position_of(q, kv) + q.start)),
    "positions are upper left": ("causal", Kernel(position=lambda _, __: 0)),
    "the tail belongs to the last sequence": ("lengths", Kernel(key_bounds=to_the_end)),
    "sequences see each other": ("prime", Kernel(key_bounds=of_all_sequences)),
    "lengths are rounded to even numbers": ("prime", Kernel(key_bounds=even)),
    "sequences begin at multiples of the largest length": ("lengths", Kernel(key_bounds=padded)),
    "sequences without keys are left out": ("lengths", Kernel(key_bounds=without_empty)),
    "sequences without queries are left out": ("lengths", Kernel(bounds=without_empty)),
    "groups wrap": ("prime", Kernel(attend=tiled)),
}
WRONG_PAGED = {
    "the last page is read whole": ("lengths", Kernel(pages=whole_pages)),
    "the slots past the end have a weight of 0": ("lengths", Kernel(pages=whole_pages, attend=touching)),
    "a page past the end is read": ("lengths", Kernel(pages=one_more_page)),
    "pages are read in the order of memory": ("prime", Kernel(pages=sorted_pages)),
    "pages follow the first page": ("prime", Kernel(pages=consecutive_pages)),
    "the first page is read again and again": ("prime", Kernel(pages=first_page_again)),
    "groups wrap": ("prime", Kernel(attend=tiled)),
}


@pytest.mark.parametrize("mistake", WRONG_PACKED)
def test_a_wrong_packed_kernel_is_refused(judged: Callable[..., Run], mistake: str) -> None:
    pattern, kernel = WRONG_PACKED[mistake]
    run = judged(kernel.functions, claims("thd"), pattern, max_fail=3)
    assert len(run.failures) == 3


@pytest.mark.parametrize("mistake", WRONG_PAGED)
def test_a_wrong_paged_kernel_is_refused(judged: Callable[..., Run], mistake: str) -> None:
    pattern, kernel = WRONG_PAGED[mistake]
    run = judged(kernel.functions, claims("paged", block_size=2), pattern, max_fail=3)
    assert len(run.failures) == 3


def exchanged(array: Array) -> Array:
    """Exchange heads and tokens."""
    return array.swapaxes(1, 2)


def tokens_first(query: Array, key: Array, value: Array, **options: Any) -> Any:
    """Attend to (batch, length, heads, size)."""
    result = reference.attention(*map(exchanged, (query, key, value)), **options)
    return tuple(map(exchanged, result)) if isinstance(result, tuple) else exchanged(result)


def tokens_first_vjp(grad_output: Array, query: Array, key: Array, value: Array, **options: Any) -> Any:
    """Differentiate with (batch, length, heads, size)."""
    grad_lse = options.pop("grad_lse", None)
    options |= {} if grad_lse is None else {"grad_lse": exchanged(grad_lse)}
    *gradients, bias, sinks = reference.attention_vjp(*map(exchanged, (grad_output, query, key, value)), **options)
    return (*map(exchanged, gradients), bias, sinks)


def heads_first_lse(query: Array, key: Array, value: Array, **options: Any) -> Any:
    """Attend to (batch, length, heads, size), with the lse of (batch, heads, length)."""
    result = tokens_first(query, key, value, **options)
    return (result[0], exchanged(result[1])) if isinstance(result, tuple) else result


def without_groups(function: Callable[..., Any]) -> Callable[..., Any]:
    """Take no groups."""

    def attention(*operands: Array, **options: Any) -> Any:
        if operands[-2].shape[1] != operands[-1].shape[1] or operands[-3].shape[1] != operands[-1].shape[1]:
            raise ValueError("the heads differ")
        return function(*operands, **options)

    return attention


def of_qkv(qkv: Array, **options: Any) -> Any:
    """Attend to (batch, 3, heads, length, size)."""
    return reference.attention(*qkv.swapaxes(0, 1), **options)


def of_qkv_vjp(grad_output: Array, qkv: Array, **options: Any) -> Any:
    """Differentiate with (batch, 3, heads, length, size)."""
    *gradients, bias, sinks = reference.attention_vjp(grad_output, *qkv.swapaxes(0, 1), **options)
    return numpy.stack(gradients, axis=1), bias, sinks


def of_kv(query: Array, kv: Array, **options: Any) -> Any:
    """Attend to keys and values in (batch, length, 2, kv_heads, size)."""
    return tokens_first(query, kv[:, :, 0], kv[:, :, 1], **options)


def of_kv_vjp(grad_output: Array, query: Array, kv: Array, **options: Any) -> Any:
    """Differentiate with keys and values in (batch, length, 2, kv_heads, size)."""
    grad_query, *gradients, bias, sinks = tokens_first_vjp(grad_output, query, kv[:, :, 0], kv[:, :, 1], **options)
    return grad_query, numpy.stack(gradients, axis=2), bias, sinks


DENSE = {
    "bshd": (tokens_first, tokens_first_vjp, {"layout": "bshd"}),
    "bshd with an lse of heads first": (heads_first_lse, None, {"layout": "bshd", "lse_layout": "heads_first"}),
    "no groups": (without_groups(reference.attention), without_groups(reference.attention_vjp), {"groups": False}),
    "qkv": (of_qkv, of_qkv_vjp, {"stacked": "qkv", "groups": False}),
    "kv": (of_kv, of_kv_vjp, {"layout": "bshd", "stacked": "kv"}),
}
WORDS = ("mask", "bias", "q_offset", "kv_lengths", "q_lengths")


@pytest.mark.parametrize("layout", DENSE)
def test_dense_layouts_repeated_heads_and_stacked_operands(judged: Callable[..., Run], layout: str) -> None:
    attention, vjp, declared = DENSE[layout]
    functions = {"attention": attention} | ({} if vjp is None else {"attention_vjp": vjp})
    described = claims("bhsd", *WORDS)
    described = replace(described, **declared, keywords={name: described.keywords[name] for name in functions})
    fused = declared.get("stacked") == "qkv"
    run = judged(functions, described, *(() if fused else ("prime", "kv_lengths/", "smoke", "vjp/plain")))
    assert not run.failures
    assert {"mask", "kv_lengths", *(["vjp", "lse"] if vjp and not fused else [])} <= set(run.asked_features)
    assert len(run.deciding) > 20
    assert ("groups" in run.asked_features) == declared.get("groups", True)


def layer_without_groups(query: Array, key: Array, value: Array, params: dict[str, Array], **options: Any) -> Any:
    """Take no groups in the layer."""
    if len({params[name].shape[1] for name in ("w_q", "w_k", "w_v")}) > 1:
        raise ValueError("the heads differ")
    return reference.multi_head_attention(query, key, value, params, **options)


def test_a_layer_without_groups_is_asked_with_repeated_parameters(judged: Callable[..., Run]) -> None:
    keywords = {"multi_head_attention": ("mask", "bias", "causal", "q_offset", "rotary", "cache")}
    described = replace(claims("bhsd", groups=False), keywords=keywords)
    run = judged({"multi_head_attention": layer_without_groups}, described, "multi_head_attention/")
    asked = {result.ask.case.id for result in run.judged}
    assert run.status == 0
    assert {"multi_head_attention/biases/1", "multi_head_attention/mask+bias/1"} <= asked
    assert not any("/cache/" in name for name in asked)
    assert "groups" not in run.asked_features


@pytest.mark.parametrize("declared", ["bhsd", "bshd"])
def test_a_dense_layout_that_is_not_the_declared_one_is_named(judged: Callable[..., Run], declared: str) -> None:
    attention = tokens_first if declared == "bhsd" else reference.attention
    described = replace(claims(declared), keywords={"attention": ()})
    other = {"bhsd": "bshd", "bshd": "bhsd"}[declared]
    with pytest.raises(NothingToJudge, match=f'layout = "{other}"'):
        judged({"attention": attention}, described, "prime")


def test_an_lse_of_another_layout_is_described(judged: Callable[..., Run]) -> None:
    described = replace(claims("bshd"), keywords={"attention": ("return_lse",)})
    run = judged({"attention": heads_first_lse}, described, "prime")
    assert run.status == 1
    assert "`lse` must have shape=" in str(run.failures[0].reason)


def asked(arrays: dict[str, Array], claims: Claims, function: str = "attention", **options: Any) -> Conversion:
    """Convert a question about arrays."""
    outputs = ("grad_query", "grad_key", "grad_value") if function == "attention_vjp" else ("output", "lse")
    return Conversion(Question("some/case", function, "float32", arrays, options, outputs), claims)


def drawn(*shape: int) -> Array:
    """Draw numbers from a fixed seed."""
    return numpy.random.default_rng(5).standard_normal(shape).astype(numpy.float32)


def operands(batch: int = 3, heads: int = 4, q_len: int = 5, kv_len: int = 11) -> dict[str, Array]:
    """Draw query, key and value."""
    return {
        "query": drawn(batch, heads, q_len, 7),
        "key": drawn(batch, 2, kv_len, 7),
        "value": drawn(batch, 2, kv_len, 3),
    }


def test_packed_tokens_have_an_empty_sequence_and_a_poisoned_tail_where_lengths_are() -> None:
    arrays = operands() | {"q_lengths": numpy.array([2, 9, 0]), "kv_lengths": numpy.array([4, -1, 11])}
    question = asked(arrays, claims("thd", "max_seqlen_kv")).question
    assert question.arrays["cu_seqlens_q"].tolist() == [0, 2, 2, 7, 7]
    assert question.arrays["cu_seqlens_kv"].tolist() == [0, 4, 4, 4, 15]
    assert {question.arrays[name].dtype.name for name in ("cu_seqlens_q", "cu_seqlens_kv")} == {"int32"}
    assert question.options == {"max_seqlen_q": 5, "max_seqlen_kv": 11}
    assert question.arrays["query"].shape == (7 + 3, 4, 7)
    assert question.arrays["value"].shape == (15 + 3, 2, 3)
    for name, tokens in (("query", 7), ("key", 15), ("value", 15)):
        assert numpy.isfinite(question.arrays[name][:tokens]).all()
        assert numpy.isnan(question.arrays[name][tokens:]).all()
    numpy.testing.assert_array_equal(
        question.arrays["key"][4:],
        numpy.pad(arrays["key"][2].swapaxes(0, 1), ((0, 3), (0, 0), (0, 0)), constant_values=numpy.nan),
    )


def test_full_lengths_are_packed_without_a_gap() -> None:
    question = asked(operands(), claims("thd")).question
    assert question.arrays["cu_seqlens_q"].tolist() == [0, 5, 10, 15]
    assert question.arrays["key"].shape == (33, 2, 7)


def test_pages_are_permuted_shared_and_poisoned() -> None:
    arrays = operands() | {"kv_lengths": numpy.array([4, 0, 11])}
    for name in ("key", "value"):
        arrays[name][2, :, :4] = arrays[name][0, :, :4]
    question = asked(arrays, claims("paged", block_size=4)).question
    table, key = question.arrays["block_table"], question.arrays["key"]
    assert table.dtype.name == "int32"
    assert table.shape == (4, 4)
    assert question.arrays["kv_lengths"].tolist() == [4, 0, 0, 11]
    assert table[0, 0] == table[3, 0]
    used = {int(table[0, 0]), *map(int, table[3, :3])}
    assert sorted(used) != list(range(3)), "a permutation that changes nothing hides the order"
    for block in range(len(key)):
        assert numpy.isnan(key[block]).all() == (block not in used)
    assert numpy.isnan(key[table[3, 2], 3:]).all()
    assert {int(block) for block in (*table[0, 1:], *table[1], *table[2], table[3, 3])}.isdisjoint(used)
    assert table.max() < len(key)


def test_pages_are_not_shared_where_gradients_are_asked() -> None:
    arrays = {name: numpy.zeros_like(array) for name, array in operands().items()}
    arrays |= {"grad_output": drawn(3, 4, 5, 3)}
    table = asked(arrays, claims("paged", block_size=4), "attention_vjp").question.arrays["block_table"]
    assert len(set(table[:, :3].ravel().tolist())) == 9


@pytest.mark.parametrize(("layout", "stacked"), sorted({*product(LAYOUTS, ("", "kv", "qkv"))} - {("paged", "qkv")}))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_results_are_read_again(layout: str, stacked: str, dtype: str) -> None:
    arrays = {"query": drawn(3, 4, 13, 7), "key": drawn(3, 2, 13, 7), "value": drawn(3, 2, 13, 7) + 1}
    arrays |= {"kv_lengths": numpy.array([4, 0, 13]), "q_lengths": numpy.array([5, 1, 0])}
    if stacked == "qkv":
        arrays |= {"query": arrays["query"][:, :2], "q_lengths": arrays["kv_lengths"]}
    arrays = {name: array.astype(dtype) if array.ndim == 4 else array for name, array in arrays.items()}
    described = claims(layout, "q_lengths", "kv_lengths", stacked=stacked or None, block_size=3)
    conversion = asked(arrays | {"grad_output": arrays["query"]}, described, "attention_vjp")
    stored = {f"grad_{name}": array for name, array in conversion.question.arrays.items() if array.ndim > 2}
    answer = conversion.restored(Answer("returned", stored, further={"again": Further("returned", stored)}))
    for outputs in (answer.outputs, answer.further["again"].outputs):
        for name, lengths in (("query", "q_lengths"), ("key", "kv_lengths"), ("value", "kv_lengths")):
            whole = layout in ("bhsd", "bshd")
            seen = (numpy.arange(arrays[name].shape[2]) < arrays[lengths][:, None]) | whole
            expected = numpy.where(seen[:, None, :, None], arrays[name].astype(float), 0)
            assert outputs[f"grad_{name}"].dtype == arrays[name].dtype
            numpy.testing.assert_array_equal(outputs[f"grad_{name}"].astype(float), expected)


def test_rows_that_are_not_packed_have_the_results_of_empty_rows() -> None:
    arrays = operands() | {"q_lengths": numpy.array([2, 5, 0]), "sinks": drawn(4)}
    conversion = asked(arrays, claims("thd"), return_lse=True)
    output, lse = numpy.ones((10, 4, 3), numpy.float32), numpy.ones((10, 4), numpy.float32)
    answer = conversion.restored(Answer("returned", {"output": output, "lse": lse}))
    assert (answer.outputs["output"][2] == 0).all()
    assert (answer.outputs["output"][0, :, :2] == 1).all()
    numpy.testing.assert_array_equal(answer.outputs["lse"][2], numpy.repeat(arrays["sinks"][:, None], 5, axis=1))


def test_gradients_of_repeated_heads_are_summed() -> None:
    conversion = asked(operands() | {"grad_output": drawn(3, 4, 5, 3)}, claims("bhsd", groups=False), "attention_vjp")
    assert conversion.question.arrays["key"].shape == (3, 4, 11, 7)
    gradients = {f"grad_{name}": array for name, array in conversion.question.arrays.items() if name != "grad_output"}
    answer = conversion.restored(Answer("returned", gradients))
    numpy.testing.assert_array_equal(answer.outputs["grad_key"], 2 * operands()["key"])


def test_gradients_of_repeated_heads_without_keys_are_summed() -> None:
    arrays = {name: array[:, :, :0] if name != "query" else array for name, array in operands().items()}
    conversion = asked(arrays | {"grad_output": drawn(3, 4, 5, 3)}, claims("bhsd", groups=False), "attention_vjp")
    gradients = {f"grad_{name}": array for name, array in conversion.question.arrays.items() if name != "grad_output"}
    assert conversion.restored(Answer("returned", gradients)).outputs["grad_key"].shape == (3, 2, 0, 7)


@pytest.mark.parametrize(
    ("layout", "shape"), [("thd", "(18, 4, 3)"), ("paged", "(18, 4, 3)"), ("bshd", "(3, 5, 4, 3)")]
)
def test_a_wrong_shape_is_described_in_the_layout(layout: str, shape: str) -> None:
    arrays = operands() | {"kv_lengths": numpy.array([4, 0, 11])}
    conversion = asked(arrays, claims(layout), return_lse=True)
    wrong = {name: numpy.ones((3, 4, 5, 3)) for name in ("output", "lse")}
    answer = conversion.restored(Answer("returned", wrong, further={"again": Further("returned", wrong)}))
    text = f"`output` must have shape={shape} in the layout {layout}, received shape=(3, 4, 5, 3)"
    assert (answer.kind, answer.reason) == ("malformed", text)


@pytest.mark.parametrize(
    ("declaration", "reason"),
    [
        ("layout = 'sbhd'", "`layout` must be one of bhsd, bshd, thd, paged, received 'sbhd'"),
        ("layout = 'thd'", "attention must take cu_seqlens_q, cu_seqlens_kv in the layout thd"),
        ("layout = 'paged'", "attention must take block_table, kv_lengths in the layout paged"),
        ("lse_layout = 'th'", "`lse_layout` must be one of tokens_first, heads_first, received 'th'"),
        ("block_size = 0", "`block_size` must be an integer from 1 to 65536, received 0"),
        ("block_size = True", "`block_size` must be an integer from 1 to 65536, received True"),
        ("groups = 1", "`groups` must be True or False, received 1"),
        ("stacked = 'qk'", "`stacked` must be one of qkv, kv, received 'qk'"),
        ("ranks = 0", "`ranks` must be an integer from 1 to 64, received 0"),
        ("ranks = 4.0", "`ranks` must be an integer from 1 to 64, received 4.0"),
        ("rank_layout = 'ring'", "`rank_layout` must be one of contiguous, striped, zigzag, received 'ring'"),
    ],
)
def test_a_wrong_declaration_is_described_in_one_line(tmp_path: Path, declaration: str, reason: str) -> None:
    path = tmp_path / "target.py"
    path.write_text(f"{declaration}\ndef attention(query, key, value): ...\n")
    with pytest.raises(TargetError) as caught:
        load(str(path))
    assert str(caught.value) == reason


def test_stacked_operands_are_those_of_the_signature(tmp_path: Path) -> None:
    path = tmp_path / "target.py"
    path.write_text(
        "stacked = 'qkv'\ndef attention(qkv, *, causal=False): ...\ndef attention_vjp(grad_output, qkv): ...\n"
    )
    assert load(str(path)).claims.keywords == {"attention": ("causal",), "attention_vjp": ()}


def test_claims_of_a_layout_pass_through_the_protocol() -> None:
    declared = claims(
        "paged", lse_layout="heads_first", block_size=4, groups=False, stacked="kv", unclaimed=("attention",)
    )
    received = claims_from(json.loads(json.dumps(claims_message(declared))), declared.name, trusted=True)
    assert received == declared


PACKED_TARGET = """
import numpy
from mha_spec import reference

layout = "thd"
dtypes = ("float32",)
conventions = {"causal_alignment": "upper_left"}


def attention(query, key, value, cu_seqlens_q, cu_seqlens_kv, *, causal=False):
    output = numpy.zeros((*query.shape[:2], value.shape[2]), query.dtype)
    for a, b, c, d in zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_kv[:-1], cu_seqlens_kv[1:]):
        parts = (x.swapaxes(0, 1)[None] for x in (query[a:b], key[c:d], value[c:d]))
        result = reference.attention(*parts, causal=causal, q_offset=0 if causal else None)
        output[a:b] = result[0].swapaxes(0, 1)
    return output
"""


def test_a_packed_target_in_a_process_of_its_own_conforms(tmp_path: Path, suite: Suite) -> None:
    path = tmp_path / "packed.py"
    path.write_text(PACKED_TARGET)
    done = run(str(path), suite, Settings(selection=Selection(only=("lengths/", "smoke/", "causal/"))))
    assert done.status == 0
    assert {"q_lengths", "kv_lengths", "causal"} <= set(done.asked_features)


@pytest.mark.parametrize("declared", [True, False])
def test_an_export_holds_packed_questions_and_verifies(tmp_path: Path, suite: Suite, declared: bool) -> None:
    described = claims("thd")
    described = described if declared else replace(described, conventions={})
    selection = Selection(only=("reading/causal/lower_right", "causal+offset/lengths-67"))
    assert export(tmp_path, described, suite, selection) > 3
    messages = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()][1:]
    lines: list[bytes] = []
    for message in messages:
        question = question_from(message, files.read(tmp_path / message["arrays"], 2**30))
        reply = answer(Target(Kernel().functions, described), question)
        lines.append(line_of(answer_message(reply, message["number"], tmp_path / message["answer"], 2**30)))
    (tmp_path / "answers.jsonl").write_bytes(b"".join(lines))
    done = verify(tmp_path, suite, Settings())
    assert done.status == 0
    assert declared or done.alignment == "lower_right_of_lengths"
