"""Attention over several processes in torch (MHA-SHARD-1 to MHA-SHARD-7).

The calls run in processes that ring_processes.py starts once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.programs import answers_of

import mha_spec_torch
from mha_spec.errors import ArgumentValueError
from mha_spec.sharding import LAYOUTS

RANKS = 4
MEANINGS = (
    *("ring zigzag", "ring striped", "ring contiguous", "ring lengths", "ring segments", "ring chunk"),
    *("ring striped chunk", "ring prefix", "ring empty", "ring plain", "all to all", "all to all contiguous"),
    *("decoding striped", "decoding zigzag", "decoding contiguous", "decoding empty"),
    *("rounding", "checkpoint", "second derivative of all to all", "example", "example of decoding"),
)
MISTAKES = ("layout", "offset", "sinks", "merge", "rank of keys", "sum of sinks", "sum of rows")
FORMS = ("ring_attention", "all_to_all_attention", "sharded_kv_attention")

Answers = list[list[dict[str, Any]]]


@pytest.fixture(scope="module")
def answers() -> Answers:
    """Run every part of ring_processes.py, the last two in separate groups, which lose a rank."""
    of_all = ("meanings", "derivatives", "mistakes", "refusals", "counts", "hidden", "memory", "overlap", "dtensors")
    parts = "+".join([*of_all, "refusals of dtensors", "example", "goldens", "rounding"]), "ends", "hangs"
    results: Answers = answers_of("ring_processes.py", *parts, timeout=600)
    assert len(results[0]) == RANKS
    return results


def of_ranks(answers: Answers, name: str) -> list[Any]:
    return [of_rank[name] for of_rank in answers[0]]


@pytest.mark.parametrize("name", MEANINGS)
def test_four_processes_give_the_result_of_a_single_process(name: str, answers: Answers) -> None:
    assert of_ranks(answers, name) == [[]] * RANKS


@pytest.mark.parametrize("name", ["both", "one entry", "one kv head", "replicated", "layer"])
def test_dtensors_of_batch_and_heads_give_the_result_of_one_process(name: str, answers: Answers) -> None:
    assert of_ranks(answers, f"dtensor {name}") == [[]] * RANKS


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_seen(name: str, answers: Answers) -> None:
    assert any(of_ranks(answers, f"mistake {name}"))


@pytest.mark.parametrize("function", ["attention", "attention_vjp"])
def test_goldens_pass_in_four_processes(function: str, answers: Answers) -> None:
    assert answers[0][0][f"golden {function}"] == []
    assert answers[0][0][f"count {function}"] > 2


@pytest.mark.parametrize("name", ["ends", "hangs"])
def test_a_rank_that_is_lost_is_an_error_of_the_others(name: str, answers: Answers) -> None:
    of_others = answers[1 if name == "ends" else 2]
    assert [of_rank[f"lost {name}"] for of_rank in of_others] == [True] * (RANKS - 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_sent_are_those_of_the_model(layout: str, answers: Answers) -> None:
    """Keys and values go n - 1 times, and in the backward once more, with n times their sums (docs/scaling.md)."""
    shard = 2 * 4 * 32 * (5 + 3)
    forward = (RANKS - 1) * shard * 2
    assert of_ranks(answers, f"bytes {layout}") == [[forward, forward + RANKS * shard * 4]] * RANKS


@pytest.mark.parametrize("layout", ["striped", "zigzag"])
def test_causal_work_is_balanced_within_five_percent(layout: str, answers: Answers) -> None:
    pairs = of_ranks(answers, f"pairs {layout}")
    assert max(pairs) <= 1.05 * min(pairs)
    assert sum(pairs) == pytest.approx(4096 * 4097 / 2, rel=0.01)


def test_causal_work_of_contiguous_shards_is_not_balanced(answers: Answers) -> None:
    pairs = of_ranks(answers, "pairs contiguous")
    assert max(pairs) > 5 * min(pairs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_a_rank_is_that_of_its_shard(layout: str, answers: Answers) -> None:
    """No tensor is larger than the queries of the shard, so that none has the keys of all ranks."""
    queries = 4 * 8 * 32 * 1024 // RANKS
    for (shorter, largest), (longer, _) in of_ranks(answers, f"memory {layout}"):
        assert largest == queries
        assert longer == pytest.approx(2 * shorter, rel=0.01)
        assert longer < 2.7 / RANKS * of_ranks(answers, "memory whole")[0][1][0]


def test_a_block_is_computed_while_the_next_keys_travel(answers: Answers) -> None:
    assert of_ranks(answers, "overlap") == [["send", "arrived", "wait"] * (RANKS - 1) + ["arrived"]] * RANKS


def test_ranks_that_a_window_hides_are_not_computed(answers: Answers) -> None:
    assert of_ranks(answers, "blocks") == [1, 2, 2, 2]


@pytest.mark.parametrize("function", FORMS)
@pytest.mark.parametrize("name", ["mask", "bias", "dropout_rate", "dropout_mask", "dropout_key"])
def test_options_of_pairs_are_refused_by_name(function: str, name: str, answers: Answers) -> None:
    (text,) = {*of_ranks(answers, f"refused {name} {function}")}
    assert text.startswith(f"`{name}` is not an option of {function}")
    assert text.endswith("[MHA-SHARD-6]")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("layout", "`layout` must be one of 'contiguous', 'striped', 'zigzag'"),
        ("odd", "odd number of tokens, received q_len=11"),
        ("length", "`kv_lengths` must be in 0<=kv_lengths<=kv_len=48"),
        ("alignment", "`q_offset` must be given"),
        ("ids", "`kv_segment_ids` must be given"),
        ("group", "`group` must be a torch.distributed.ProcessGroup"),
        ("keyword", "Did you mean `group`"),
        ("heads", "must have heads that are a multiple of the number of ranks, 4"),
        ("transform", "must not be transformed by torch.func"),
        ("sequence", "`query` must not be sharded over the sequence, received"),
        ("placement", "`key` must have the placements of `query`"),
        ("mixture", "`key` must be a DTensor of the same mesh"),
        ("sinks", "`sinks` must be a DTensor"),
        ("dropout", "`dropout_mask` must be given with dropout_rate"),
        ("uneven", "`key` must have heads that are a multiple of the ranks"),
        ("cotangent", "`grad_output` must be a DTensor, as `query`"),
        ("packed", "must not be DTensors in varlen_attention"),
        ("ring", "must not be DTensors in ring_attention"),
        ("second derivative", "ring_attention of mha_spec_torch has no second derivative"),
    ],
)
def test_errors_name_the_argument(name: str, text: str, answers: Answers) -> None:
    assert all(text in received for received in of_ranks(answers, f"refused {name}"))


@pytest.mark.parametrize("function", FORMS)
def test_a_call_before_the_group_is_initialised_is_refused(function: str) -> None:
    x = torch.zeros(1, 4, 4, 2)
    with pytest.raises(ArgumentValueError, match=r"`group` must be a process group.*init_process_group"):
        getattr(mha_spec_torch, function)(x, x, x)
