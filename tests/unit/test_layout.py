"""Layout: sizes, coordinates and groups that fit together, and one-line errors where they cannot."""

from __future__ import annotations

import itertools

import pytest

from r1mega.config import ConfigError
from r1mega.parallel_state import DENSE_AXES, EXPERT_AXES, GROUP_NAMES, Layout

LAYOUTS = [
    Layout(1),
    Layout(6, tp=3, pp=2, ep=3),
    Layout(8, tp=2, pp=2, ep=4),
    Layout(8, tp=4, pp=2, etp=2, ep=2),
    Layout(16, tp=2, cp=2, pp=2, ep=8),
    Layout(24, tp=2, pp=3, ep=4, etp=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_both_cuts_multiply_to_the_world(layout: Layout) -> None:
    assert layout.tp * layout.cp * layout.dp * layout.pp == layout.world_size
    assert layout.etp * layout.ep * layout.edp * layout.pp == layout.world_size


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", GROUP_NAMES)
def test_groups_of_a_name_hold_every_rank_once_and_are_of_its_size(layout: Layout, name: str) -> None:
    groups = layout.groups(name)
    assert sorted(itertools.chain(*groups)) == list(range(layout.world_size))
    assert {len(ranks) for ranks in groups} == {layout.size(name)}
    assert all(ranks == sorted(ranks) for ranks in groups)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("axes", [DENSE_AXES, EXPERT_AXES])
def test_position_in_a_group_is_the_coordinate_on_its_axis(layout: Layout, axes: tuple[str, ...]) -> None:
    for axis in axes:
        for ranks in layout.groups(axis):
            assert [layout.coordinates(rank)[axis] for rank in ranks] == list(range(layout.size(axis)))


def test_ranks_are_numbered_tensor_first_then_data_then_pipeline() -> None:
    layout = Layout(8, tp=2, pp=2, ep=2)
    assert layout.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.groups("dp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.groups("pp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert layout.groups("ep") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.groups("edp") == [[0, 2], [1, 3], [4, 6], [5, 7]]


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"world_size": 8, "tp": 3}, "parallel.tp=3"),
        ({"world_size": 8, "pp": 16}, "parallel.pp=16"),
        ({"world_size": 8, "tp": 4, "cp": 4}, "parallel.cp=4"),
        ({"world_size": 8, "pp": 2, "ep": 8}, "parallel.ep=8"),
        ({"world_size": 8, "etp": 5}, "parallel.etp=5"),
        ({"world_size": 8, "ep": 0}, "parallel.ep=0"),
        ({"world_size": 8, "tp": -2}, "parallel.tp=-2"),
        ({"world_size": 0}, "world_size=0"),
    ],
)
def test_an_illegal_layout_is_a_line_that_names_the_size_and_what_fits(sizes: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Layout(**sizes)
    message = str(caught.value)
    assert message.startswith(f"{named}: must ")
    assert "\n" not in message
    assert isinstance(caught.value, ValueError)


def test_the_sizes_that_an_error_suggests_do_fit() -> None:
    with pytest.raises(ConfigError, match=r"try 2, 3 or 6$"):
        Layout(12, pp=2, tp=4)
    for tp in (2, 3, 6):
        assert Layout(12, pp=2, tp=tp).dp == 6 // tp


def test_an_unknown_group_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"group=pd: must be one of tp, cp"):
        Layout(2).groups("pd")
