"""Each kind of real attention can be asked enough cases of each of its options."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mha_spec_conformance.asking import kinds
from mha_spec_conformance.asking.kinds import AttentionKind, LayerKind, counted, together
from mha_spec_conformance.commands.listing import all_kinds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mha_spec_conformance.asking.kinds import Count
    from mha_spec_conformance.suite.cases import Case, Suite

FEWEST = {"forward": 8, "backward": 4}
"""The fewest cases of an option, by direction."""

FEWEST_TOGETHER = {"forward": 4, "backward": 2}
"""The fewest cases of options that models use together, by direction."""

FEWEST_OF_A_LAYER = 40


@pytest.fixture(scope="module")
def by_id(suite: Suite) -> Mapping[str, Case]:
    return {case.id: case for case in suite.cases}


def _fewest(count: Count, layers: frozenset[str]) -> int:
    if count.option in together():
        return FEWEST_TOGETHER[count.direction]
    if count.kind in layers and count.option == "all":
        return FEWEST_OF_A_LAYER
    return FEWEST[count.direction]


def test_each_kind_can_be_asked_each_of_its_options(suite: Suite) -> None:
    layers = frozenset(kind.name for kind in kinds.kinds() if isinstance(kind, LayerKind))
    lacking = [count for count in counted(suite.cases) if count.cases < _fewest(count, layers)]
    assert not lacking, "\n".join(map(str, lacking))


def test_kinds_have_names_and_options_that_exist() -> None:
    table = kinds.kinds()
    assert len({kind.name for kind in table}) == len(table) >= 20
    for kind in table:
        assert {*kind.options} <= {*kinds.OPTIONS}
    assert all(options <= {*kinds.OPTIONS} for options in together().values())


@pytest.mark.parametrize(
    ("kind", "taken", "refused"),
    [
        (AttentionKind("", "", groups=False), "tiles/128/mask/1", "tiles/192-333/mask/3"),
        (AttentionKind("", "", groups=4), "tiles/192-333/mask/3", "tiles/128/mask/1"),
        (AttentionKind("", "", equal_lengths=True), "tiles/257/mask/3", "tiles/192-333/mask/3"),
        (AttentionKind("", "", equal_sizes=True), "tiles/257/mask/3", "size/192-128/plain"),
        (AttentionKind("", "", head_sizes=(64, 128)), "tiles/129-255/mask/1", "size/80/plain"),
        (AttentionKind("", "", multiple_of=16), "size/80/plain", "size/72/plain"),
        (AttentionKind("", "", block=128), "tiles/128/mask/1", "tiles/257/mask/3"),
        (AttentionKind("", "", queries=(1, 8)), "decode/4-of-1000/mask/1", "decode/33-of-300/causal/1"),
        (AttentionKind("", "", fewer_queries=True), "decode/4-of-1000/mask/1", "tiles/128/mask/1"),
        (AttentionKind("", "", dtypes=("bfloat16",)), "tiles/129-255/mask/1", "tiles/257/mask/3"),
        (AttentionKind("", "", options=("mask",)), "tiles/128/mask/1", "tiles/128/mask+bias/1"),
        (
            AttentionKind("", "", options=("causal",), alignments=("upper_left",)),
            "tiles/128/causal/1",
            "tiles/129-255/causal/1",
        ),
        (
            AttentionKind("", "", options=("causal",), alignments=("lower_right",)),
            "tiles/129-255/causal/1",
            "tiles/192-333/causal/3",
        ),
    ],
)
def test_a_kind_takes_the_options_and_sizes_of_its_members(
    kind: AttentionKind, taken: str, refused: str, by_id: Mapping[str, Case]
) -> None:
    assert kind.takes(by_id[f"attention/{taken}"])
    assert not kind.takes(by_id[f"attention/{refused}"])


@pytest.mark.parametrize("attends", ["self", "cross"])
@pytest.mark.parametrize("biases", [False, True])
def test_a_layer_takes_its_tokens_and_its_biases(attends: str, biases: bool, by_id: Mapping[str, Case]) -> None:
    kind = LayerKind("", "", attends=attends, biases=biases)
    taken = {
        label: kind.takes(by_id[f"multi_head_attention/one-width/{label}/mask/1"])
        for label in ("self", "cross", "self+biases", "cross+biases")
    }
    assert [label for label, holds in taken.items() if holds] == [attends + ("+biases" if biases else "")]
    assert not kind.takes(by_id["multi_head_attention/self/1"])


def test_the_command_counts_the_cases_of_each_kind() -> None:
    text = all_kinds("attention/tiles/128/mask/1")
    assert "no groups: " in text
    assert "forward   all 1; mask 1; bias 0;" in text
