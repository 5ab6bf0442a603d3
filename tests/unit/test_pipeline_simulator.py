"""The simulator: published figures, its model of time, and the pictures made of it."""

from __future__ import annotations

import json
import re
from itertools import chain, pairwise

import pytest

from r1mega.pipeline.actions import Action, Kind, Overlap, ScheduleError, Table
from r1mega.pipeline.checker import check
from r1mega.pipeline.costs import Costs
from r1mega.pipeline.schedules import SCHEDULES, make_table
from r1mega.pipeline.simulator import Simulation, simulate
from r1mega.pipeline.timeline.picture import LANE, _boxes, draw, picture
from r1mega.pipeline.timeline.terminal import Terminal, bars, timeline
from r1mega.pipeline.timeline.trace import trace

UNIT = Costs(1.0, 1.0, 1.0)
# Two ranks, two stages each in a V: rank 1 hands its first stage's activations to itself.
V = """\
0F0,3F0,3B0,0B0,0R,3R
1F0,2F0,2B0,1B0,1R,2R
"""


def table(*rows: str) -> Table:
    return Table.from_csv("\n".join(row.replace(" ", ",") for row in rows))


def times(simulation: Simulation, rank: int) -> dict[str, tuple[float, float]]:
    return {str(span.cell): (span.start, span.end) for span in simulation.spans[rank]}


# Published figures


@pytest.mark.parametrize(
    ("p", "m", "costs", "rate"),
    [
        (8, 24, Costs(18.522, 18.086, 9.337, 0.601), 0.2431),
        (8, 32, Costs(18.513, 18.086, 9.331, 0.626), 0.1985),
        (8, 64, Costs(18.546, 18.097, 9.321, 0.762), 0.1240),
        (16, 48, Costs(11.347, 11.248, 8.132, 0.377), 0.2552),
    ],
)
def test_one_f_one_b_has_the_bubble_rates_of_the_zero_bubble_paper(p: int, m: int, costs: Costs, rate: float) -> None:
    assert round(simulate(make_table("1f1b", p, m), costs).bubble_rate, 4) == rate


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_bubble_of_a_pipeline_with_one_stage_a_rank_is_its_depth_less_one_times_a_microbatch(name: str) -> None:
    for p, m in [(1, 3), (2, 5), (4, 4), (5, 13)]:
        simulation = simulate(make_table(name, p, m), Costs(2.0, 3.0, 1.5))
        assert simulation.makespan == pytest.approx((m + p - 1) * 6.5)
        assert simulation.busy == pytest.approx([m * 6.5] * p)
        assert simulation.bubble_rate == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize(
    ("p", "m", "costs", "rates"),
    [
        (8, 24, (18.522, 18.086, 9.337, 0.601), (0.1585, 0.1083, 0.1055)),
        (8, 32, (18.513, 18.086, 9.331, 0.626), (0.1242, 0.0837, 0.0818)),
        (8, 64, (18.546, 18.097, 9.321, 0.762), (0.0674, 0.0444, 0.0443)),
        (16, 48, (11.347, 11.248, 8.132, 0.377), (0.1397, 0.0672, 0.1104)),
    ],
)
def test_the_other_schedules_of_the_zero_bubble_paper(
    p: int, m: int, costs: tuple[float, ...], rates: tuple[float, ...]
) -> None:
    for name, rate in zip(("zb-h1", "zb-h2"), rates[:2], strict=True):
        assert round(simulate(make_table(name, p, m), Costs.of_rank(*costs)).bubble_rate, 4) == rate
    interleaved = simulate(make_table("interleaved", p, m, 3), Costs.of_rank(*costs, chunks=3))
    # the paper's figure leaves out the communication of one round
    assert round(1 - interleaved.busy[0] / (interleaved.longest_rank - p * costs[3]), 4) == rates[2]


@pytest.mark.parametrize(
    ("p", "m", "rates"),
    [
        (4, 8, {"1f1b": 0.2727, "zbv": 0, "v-half": 0.0943, "v-min": 0.1864}),
        (8, 16, {"1f1b": 0.3043, "zbv": 0, "v-half": 0.1504, "v-min": 0.2195}),
        (8, 32, {"1f1b": 0.1795, "zbv": 0, "v-half": 0.0813, "v-min": 0.1233}),
    ],
)
def test_bubble_rates_at_unit_costs(p: int, m: int, rates: dict[str, float]) -> None:
    for name, rate in rates.items():
        made = make_table(name, p, m)
        simulation = simulate(made, Costs.of_rank(1.0, 1.0, 1.0, chunks=made.stages_per_copy / p))
        assert round(simulation.bubble_rate, 4) == rate
        if name == "zbv":
            assert round(simulation.bubble_rate_makespan, 4) == {8: 0.0588, 16: 0.0680, 32: 0.0352}[m]


# The model of time


def test_an_action_waits_for_its_rank_and_for_its_message() -> None:
    simulation = simulate(table("0F0 0F1 0B0 0B1 0R", "1F0 1B0 1F1 1B1 1R"), Costs(1.0, 2.0, 3.0, communication=0.5))
    assert times(simulation, 0) == {
        "0F0": (0, 1), "0F1": (1, 2), "0B0": (8, 13), "0B1": (14, 19), "0R": (19, 19)
    }  # fmt: skip
    assert times(simulation, 1) == {
        "1F0": (1.5, 2.5), "1B0": (2.5, 7.5), "1F1": (7.5, 8.5), "1B1": (8.5, 13.5), "1R": (13.5, 13.5)
    }  # fmt: skip


def test_a_weight_gradient_holds_nobody_up() -> None:
    simulation = simulate(table("0F0 0I0 0W0 0R", "1F0 1I0 1W0 1R"), Costs(1.0, 2.0, 4.0))
    assert times(simulation, 0) == {"0F0": (0, 1), "0I0": (4, 6), "0W0": (6, 10), "0R": (10, 10)}
    assert times(simulation, 1)["1W0"] == (4, 8)


def test_what_stays_on_a_rank_needs_no_communication() -> None:
    simulation = simulate(Table.from_csv(V), Costs(1.0, 1.0, 0.0, communication=10.0))
    assert times(simulation, 1)["2F0"] == (12, 13)
    assert times(simulation, 0) == {
        "0F0": (0, 1), "3F0": (23, 24), "3B0": (24, 25), "0B0": (47, 48), "0R": (48, 48), "3R": (48, 48)
    }  # fmt: skip


def test_an_overlap_starts_when_both_parts_can_and_hands_on_at_its_end() -> None:
    # one stage a rank; rank 0 overlaps the forward of microbatch 1 with the backward of microbatch 0
    overlapped = table("0F0 (0F1;0B0) 0B1 0R", "1F0 1B0 1F1 1B1 1R")
    costs = Costs(1.0, 1.0, 1.0, communication=0.25, overlap=0.5)
    simulation = simulate(overlapped, costs)
    assert times(simulation, 0)["(0F1;0B0)"] == (4.5, 6.0)
    assert times(simulation, 1)["1F1"] == (6.25, 7.25)
    assert simulation.busy == [pytest.approx(1 + 1.5 + 2), 6]


def test_recomputation_takes_as_long_as_the_forward_unless_told_otherwise() -> None:
    row = table("0F0 0C0 0B0 0R")
    assert simulate(row, Costs(3.0, 1.0, 1.0)).makespan == 8
    assert simulate(row, Costs(3.0, 1.0, 1.0, recompute=0.5)).makespan == 5.5


def test_reductions_and_optimizer_steps_are_free_unless_told_otherwise() -> None:
    row = table("0F0 0B0 0R 0O")
    assert simulate(row, UNIT).makespan == 3
    assert simulate(row, Costs(1.0, 1.0, 1.0, reduce=0.5, optimizer_step=0.25)).makespan == 3.75


def test_stages_may_have_costs_of_their_own() -> None:
    simulation = simulate(table("0F0 0B0 0R", "1F0 1B0 1R"), Costs([1.0, 5.0], [1.0, 2.0], 1.0))
    assert times(simulation, 1)["1F0"] == (1, 6)
    assert times(simulation, 0)["0B0"] == (9, 11)


def test_both_copies_of_a_model_cost_the_same() -> None:
    two = Table([0, 1, 1, 0], table("0F0 3F1 3B1 0B0 0R 3R", "1F0 2F1 1B0 2B1 1R 2R").rows, num_copies=2)
    check(two)
    lengths = {str(s.cell): s.end - s.start for row in simulate(two, Costs([1.0, 2.0], 1.0, 1.0)).spans for s in row}
    assert (lengths["0F0"], lengths["1F0"], lengths["2F1"], lengths["3F1"]) == (1, 2, 1, 2)


def test_a_step_that_does_not_begin_on_rank_0_begins_at_0_all_the_same() -> None:
    """Two copies: the microbatches of the second one enter at the last rank."""
    two = Table([0, 1, 1, 0], table("3F1 0F0 3B1 0B0 0R 3R", "2F1 1F0 1B0 2B1 1R 2R").rows, num_copies=2)
    assert times(simulate(two, UNIT), 1)["2F1"] == (0, 1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_rank_does_two_things_at_once_and_none_starts_before_its_message_is_there(name: str) -> None:
    made = make_table(name, 4, 8)
    simulation = simulate(made, Costs(1.1, 1.7, 0.6, communication=0.3))
    ended = {action: s.end for row in simulation.spans for s in row for action in s.actions}
    for rank, row in enumerate(simulation.spans):
        assert [span.cell for span in row] == made.rows[rank]
        assert all(before.end <= after.start for before, after in pairwise(row))
        for span in row:
            for kind, stage, microbatch in span.actions:
                other = made.previous_stage(stage) if kind is Kind.F else made.next_stage(stage)
                if kind in (Kind.F, Kind.B, Kind.I) and other is not None:
                    same = ended.get(Action(kind, other, microbatch))
                    arrived = same if same is not None else ended[Action(_half(kind), other, microbatch)]
                    travel = 0.3 * (made.stage_to_rank[other] != rank)
                    assert span.start >= arrived + travel - 1e-9


def _half(kind: Kind) -> Kind:
    """What another stage may have instead of ``kind``."""
    return Kind.I if kind is Kind.B else Kind.B


def test_a_table_that_deadlocks_says_who_waits_for_what() -> None:
    with pytest.raises(ScheduleError, match=r"rank 0, action 0B0: waits for ever for the gradients from stage 1"):
        simulate(table("0F0 0B0 0F1 0B1 0R", "1F1 1F0 1B0 1B1 1R"), UNIT)


# Bubble rates


def test_waiting_for_the_first_microbatch_is_no_bubble_by_the_longest_rank_but_is_by_the_whole_pipeline() -> None:
    simulation = simulate(table("0F0 0I0 0R", "1F0 1I0 1R"), Costs(1.0, 1.0, 0.0))
    late = Simulation(simulation.table, [simulation.spans[1], simulation.spans[1]])  # both ranks work from 1 to 3
    assert (late.makespan, late.longest_rank) == (3, 2)
    assert late.bubble_rate == 0
    assert late.bubble_rate_makespan == pytest.approx(1 / 3)


def test_waiting_of_light_stages_for_heavy_ones_is_bubble() -> None:
    m = 1000
    simulation = simulate(make_table("1f1b", 2, m), Costs([1.0, 3.0], [1.0, 3.0], [1.0, 3.0]))
    assert simulation.busy == [3 * m, 9 * m]
    assert simulation.bubble_rate == pytest.approx(1 / 3, abs=1e-3)  # rank 0 idles two thirds of the time, rank 1 not


def test_a_bubble_is_never_negative() -> None:
    assert simulate(make_table("zb-h2", 2, 4), Costs(0.1, 0.1, 0.1)).bubble_rate == 0.0  # not -2e-16


def test_an_empty_step_has_no_bubble() -> None:
    simulation = simulate(make_table("1f1b", 2, 2), Costs(0.0, 0.0, 0.0))
    assert (simulation.makespan, simulation.bubble_rate, simulation.bubble_rate_makespan) == (0, 0, 0)


# What ranks hold


@pytest.mark.parametrize("name", SCHEDULES)
def test_peak_activations_are_what_the_checker_counts(name: str) -> None:
    for p, m in [(2, 4), (4, 8), (4, 12)]:
        made = make_table(name, p, m)
        unit = p / made.stages_per_copy
        simulation = simulate(made, Costs(1.0, 0.7, 1.9, communication=0.1))
        assert simulation.peak_activations == [pairs * unit for pairs in check(made).peak_activations]


def test_activations_are_held_until_the_weight_gradient_and_from_the_recomputation() -> None:
    split = simulate(table("0F0 0I0 0F1 0I1 0W0 0W1 0R"), UNIT)
    assert split.activations(0) == [(0, 1), (2, 2), (5, 1), (6, 0)]
    recomputed = simulate(table("0F0 0F1 0C0 0B0 0C1 0B1 0R"), UNIT)
    assert recomputed.activations(0) == [(2, 1), (5, 0), (5, 1), (8, 0)]
    assert recomputed.peak_activations == [1]


def test_an_overlap_holds_the_activations_of_both_its_parts() -> None:
    assert simulate(table("0F0 (0F1;0B0) 0B1 0R"), UNIT).peak_activations == [2]


def test_a_stage_of_two_on_a_rank_counts_half() -> None:
    simulation = simulate(Table.from_csv(V), UNIT)
    assert simulation.peak_activations == [1, 1]
    assert simulation.weights == [1, 1]


def test_a_rank_with_stages_of_two_copies_holds_twice_the_weights() -> None:
    two = Table([0, 1, 1, 0], table("0F0 3F1 3B1 0B0 0R 3R", "1F0 2F1 1B0 2B1 1R 2R").rows, num_copies=2)
    assert simulate(two, UNIT).weights == [2, 2]


# Costs


def test_costs_of_a_rank_are_shared_by_its_chunks() -> None:
    assert Costs.of_rank(2.0, 4.0, 6.0, communication=0.5, chunks=2) == Costs(1.0, 2.0, 3.0, communication=0.5)


def test_costs_by_stage_are_joined_for_fewer_stages_and_cut_for_more() -> None:
    costs = Costs([1.0, 2.0, 3.0, 4.0], 1.0, 1.0, communication=0.5)
    assert costs.recut(2) == Costs([3.0, 7.0], [2.0, 2.0], [2.0, 2.0], 0.5, reduce=[0, 0], optimizer_step=[0, 0])
    assert costs.recut(8).forward == [0.5, 0.5, 1.0, 1.0, 1.5, 1.5, 2.0, 2.0]
    assert costs.recut(4) is costs and UNIT.recut(3) is UNIT
    with pytest.raises(ValueError, match="costs for 4 stages cannot be cut into 6 stages"):
        costs.recut(6)


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf"), True, "1"])
def test_what_is_no_time_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="backward_weight: .* is not a time; must be a number of 0 or more"):
        Costs(1.0, 1.0, [1.0, wrong])
    with pytest.raises(ValueError, match="communication"):
        Costs(1.0, 1.0, 1.0, communication=wrong)


def test_costs_for_another_number_of_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="costs are given for 3 stages, but the schedule has 2"):
        simulate(make_table("1f1b", 2, 2), Costs([1.0, 1.0, 1.0], 1.0, 1.0))
    with pytest.raises(ValueError, match="the same number of stages: forward 2, backward_input 3"):
        Costs([1.0] * 2, [1.0] * 3, 1.0)
    with pytest.raises(ValueError, match="forward: needs a number a stage, or one for all, but is empty"):
        Costs([], 1.0, 1.0)


# Pictures


def test_the_terminal_shows_each_action_where_it_happens() -> None:
    simulation = simulate(table("0F0 0F1 0B0 0B1 0R", "1F0 1B0 1F1 1B1 1R"), Costs(1.0, 1.0, 1.0))
    lines = timeline(simulation, Terminal(30 + 9 * 4 + 1)).splitlines()
    assert lines[0].startswith("rank  bubble   peak  weights  0") and lines[0].endswith(" 9")
    assert lines[1] == "   0   33.3%      2        1  F0──F1──········B0──────····B1──────"
    assert lines[2].endswith("····F0──B0──────F1──B1──────········")


def test_the_terminal_picture_is_as_wide_as_told_and_plain_ascii_where_needed() -> None:
    simulation = simulate(make_table("1f1b", 4, 64), UNIT)
    for width in (60, 100, 200, 1000):
        lines = timeline(simulation, Terminal(width, unicode=False)).splitlines()[1:5]
        assert {len(line) for line in lines} == {width - 1}
        assert "".join(lines).isascii()
    assert (
        len(timeline(simulation, Terminal(1)).splitlines()[1]) == 50
    )  # what is left to see where there is no room at all


def test_colours_do_not_change_what_the_terminal_shows() -> None:
    simulation = simulate(Table.from_csv(V), UNIT)
    coloured = timeline(simulation, Terminal(colour=True))
    assert "\033[" in coloured
    assert re.sub(r"\033\[[\d;]*m", "", coloured).replace(" ", "") == timeline(simulation).replace("─", "").replace(
        " ", ""
    )


def test_a_crowded_line_shows_what_takes_most_of_each_column() -> None:
    simulation = simulate(make_table("gpipe", 1, 50), UNIT)
    assert timeline(simulation, Terminal(30 + 1 + 21)).splitlines()[1].endswith("  " + "F" * 7 + "B" * 14)


def test_bars_are_as_long_as_the_steps() -> None:
    slow, fast = (simulate(make_table("1f1b", 2, 2), Costs(c, c, c)) for c in (2.0, 1.0))
    drawn = bars({"slow": slow, "fast": fast}, columns=12)
    assert drawn == {"slow": "████████░░░░", "fast": "████░░"}


def test_a_trace_has_each_action_as_a_slice_with_its_times() -> None:
    simulation = simulate(table("0F0 (0F1;0B0) 0B1 0R", "1F0 1B0 1F1 1B1 1R"), Costs(1.0, 1.0, 1.0, 0.25))
    events = json.loads(trace({"mine": simulation}))["traceEvents"]
    slices = {event["name"]: event for event in events if event["ph"] == "X"}
    assert len(slices) == sum(map(len, simulation.table.rows))
    assert (slices["(0F1;0B0)"]["ts"], slices["(0F1;0B0)"]["dur"], slices["(0F1;0B0)"]["tid"]) == (4500, 3000, 0)
    assert slices["1F1"]["args"] == {"stage": [1], "microbatch": [1]}
    starts, ends = ({e["id"]: e["ts"] for e in events if e["ph"] == phase} for phase in "sf")
    assert len(starts) == 4 and starts.keys() == ends.keys()
    assert all(starts[message] < ends[message] for message in starts)


def test_the_trace_counts_activations() -> None:
    events = json.loads(trace({"a": simulate(make_table("1f1b", 2, 4), UNIT)}))["traceEvents"]
    held = [e["args"]["microbatches"] for e in events if e["ph"] == "C" and e["name"] == "activations of rank 0"]
    assert (max(held), held[0], held[-1]) == (2, 0, 0)


def test_the_picture_shows_every_schedule_below_the_one_before() -> None:
    simulations = {name: simulate(make_table(name, 2, 4), UNIT) for name in ("1f1b", "gpipe", "zbv")}
    figure = draw(simulations)
    lanes, memory = figure.axes[::2], figure.axes[1::2]
    assert [axes.texts[-2].get_text() for axes in lanes] == list(simulations)
    ends = [1.0, *chain.from_iterable((box.y1, box.y0) for box in (axes.get_position() for axes in lanes)), 0.0]
    assert all(above > below for above, below in pairwise(ends))
    assert [axes.get_position().y0 for axes in memory] == [axes.get_position().y0 for axes in lanes]
    assert len({axes.get_xlim() for axes in lanes}) == 1
    assert picture(simulations).startswith(b"\x89PNG")


def test_the_parts_of_an_overlap_share_its_lane() -> None:
    simulation = simulate(table("0F0 (0F1;0B0) 0B1 0R"), UNIT)
    boxes = list(_boxes(simulation))
    assert [str(action) for action, *_ in boxes] == ["0F0", "0F1", "0B0", "0B1"]
    assert isinstance(simulation.spans[0][1].cell, Overlap)
    edges = [(low, high) for _, _, _, low, high, _ in boxes]
    assert edges == [(-LANE / 2, LANE / 2), (-LANE / 2, 0), (0, LANE / 2), (-LANE / 2, LANE / 2)]
