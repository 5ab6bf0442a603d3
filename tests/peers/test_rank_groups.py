"""Rank groups against megatron-core's ``RankGenerator``, for every legal layout of 8 and of 16 ranks."""

from __future__ import annotations

import itertools

import pytest

from r1mega.data.megatron import quiet_import
from r1mega.parallel_state import Layout

with quiet_import():
    from megatron.core.parallel_state import RankGenerator

ORDER = "tp-cp-ep-dp-pp"
SIZES = (1, 2, 4, 8, 16)

# Our name -> Megatron's tokens, in the generator of the dense layers and in that of the experts.
DENSE = {
    "tp": "tp", "cp": "cp", "dp": "dp", "pp": "pp",
    "dp_cp": "dp-cp", "tp_cp": "tp-cp", "tp_dp_cp": "tp-dp-cp", "tp_pp": "tp-pp",
}  # fmt: skip
EXPERT = {"etp": "tp", "ep": "ep", "edp": "dp", "pp": "pp", "etp_ep": "tp-ep", "etp_ep_pp": "tp-ep-pp"}


def legal_layouts(world_size: int) -> list[Layout]:
    """Layouts of ``world_size`` ranks, by the definition: both cuts have a whole number of data-parallel ranks."""
    return [
        Layout(world_size, tp=tp, pp=pp, cp=cp, ep=ep, etp=etp)
        for tp, pp, cp, ep, etp in itertools.product(SIZES, repeat=5)
        if world_size % (tp * cp * pp) == 0 and world_size % (etp * ep * pp) == 0
    ]


def megatron_groups(layout: Layout) -> dict[str, list[list[int]]]:
    """Every group by our name, from Megatron's two generators."""
    dense = RankGenerator(tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=layout.cp, order=ORDER)
    expert = RankGenerator(tp=layout.etp, ep=layout.ep, dp=layout.edp, pp=layout.pp, cp=1, order=ORDER)
    return {
        **{name: expert.get_ranks(token) for name, token in EXPERT.items()},
        **{name: dense.get_ranks(token) for name, token in DENSE.items()},
    }


@pytest.mark.parametrize(("world_size", "count"), [(8, 146), (16, 371)])
def test_every_legal_layout_has_the_groups_of_megatron(world_size: int, count: int) -> None:
    layouts = legal_layouts(world_size)
    assert len(layouts) == count
    for layout in layouts:
        for name, expected in megatron_groups(layout).items():
            assert layout.groups(name) == expected, (layout, name)


def test_the_two_cuts_of_megatron_share_their_pipeline_groups() -> None:
    for layout in legal_layouts(16):
        expert = RankGenerator(tp=layout.etp, ep=layout.ep, dp=layout.edp, pp=layout.pp, cp=1, order=ORDER)
        assert layout.groups("pp") == expert.get_ranks("pp")
