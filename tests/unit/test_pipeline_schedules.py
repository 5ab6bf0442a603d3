"""Schedule tables, their generators and the checker."""

from __future__ import annotations

import graphlib
import itertools
import random
from itertools import chain

import pytest

from r1mega.pipeline.actions import Action, Kind, ScheduleError, Table
from r1mega.pipeline.checker import check, check_transfers
from r1mega.pipeline.schedules import SCHEDULES, gpipe, one_f_one_b
from r1mega.pipeline.transfers import programs

# Four stages in a V on two ranks, the backward split: activations and gradients share each direction.
V_SPLIT = """\
0F0,0F1,3F0,3I0,3F1,3I1,3W0,0I0,3W1,3R,0I1,0W0,0W1,0R
1F0,2F0,1F1,2F1,2I0,1I0,2W0,2I1,1I1,1W0,2W1,1W1,1R,2R
"""


def table(*rows: str) -> Table:
    return Table.from_csv("\n".join(row.replace(" ", ",") for row in rows))


def refusal(broken: Table) -> str:
    with pytest.raises(ScheduleError) as caught:
        check(broken)
    return str(caught.value)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_generator_makes_a_table_that_passes_for_every_size(name: str) -> None:
    for num_ranks, num_microbatches in itertools.product(range(1, 17), [*range(1, 9), 12, 15, 16, 17, 23, 24]):
        made = SCHEDULES[name](num_ranks, num_microbatches)
        assert (made.num_ranks, made.num_microbatches) == (num_ranks, num_microbatches)
        check(made)


def test_one_f_one_b_peak_activations_equal_the_distance_to_the_end_of_the_pipeline() -> None:
    for p, m in itertools.product(range(1, 9), range(1, 13)):
        assert check(one_f_one_b(p, m)).peak_activations == [min(p - rank, m) for rank in range(p)]


def test_gpipe_peak_activations_equal_the_number_of_microbatches() -> None:
    for p, m in itertools.product(range(1, 9), range(1, 13)):
        assert check(gpipe(p, m)).peak_activations == [m] * p


def test_activations_of_a_split_backward_are_held_until_the_weight_gradient() -> None:
    assert check(table("0F0 0I0 0F1 0I1 0W0 0W1 0R")).peak_activations == [2]


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_row_ends_the_work_of_a_stage_with_its_reduction(name: str) -> None:
    for rank, row in enumerate(SCHEDULES[name](4, 6).rows):
        assert row[-1] == Action(Kind.R, rank)
        assert [action.microbatch for action in row if action.kind is Kind.B] == list(range(6))


def test_a_table_survives_csv_and_prints_one_line_a_rank() -> None:
    for made in (gpipe(3, 2), one_f_one_b(4, 12), Table.from_csv(V_SPLIT)):
        assert Table.from_csv(made.to_csv()) == made
    assert str(one_f_one_b(2, 2)) == "rank 0: 0F0 0F1 0B0 0B1 0R\nrank 1: 1F0 1B0 1F1 1B1 1R"
    assert Table.from_csv(V_SPLIT).stage_to_rank == [0, 1, 1, 0]
    assert table("0F0,,0B0, 0R") == gpipe(1, 1)


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        ("0F0,0X0", "rank 0: '0X0' is not an action"),
        ("0F0,0R1", "rank 0: '0R1' is not an action"),
        ("0F0\n0B0", "rank 1, action 0B0: stage 0 runs on rank 0 already"),
        ("0F0\n2F0", "no rank runs stage 1"),
    ],
)
def test_csv_that_is_no_table_is_refused(csv: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Table.from_csv(csv)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["0F0 0F1 0B0 0R"], "rank 0, action 0B1: is missing"),
        (["0F0 0I0 0R"], "rank 0, action 0W0: is missing"),
        (["0F0 0W0 0R"], "rank 0, action 0I0: is missing"),
        (["0F0 0B0 0W0 0R"], "rank 0, action 0W0: 0B0 does the same work already"),
        (["0F0 0B0"], "rank 0, action 0R: is missing"),
        (["0F0 0B0 0B0 0R"], "rank 0, action 0B0: comes twice"),
        (["0F1 0B1 0R"], "rank 0, action 0F0: is missing"),
        (["0B0 0F0 0R"], "rank 0, action 0B0: comes before 0F0"),
        (["0F0 0W0 0I0 0R"], "rank 0, action 0W0: comes before 0I0"),
        (["0F0 0I0 0R 0W0"], "rank 0, action 0W0: comes after 0R"),
        (["0F0 0B0 0R", ""], "rank 1: holds no stage"),
        (["0R"], "rank 0: there is no microbatch"),
        (["1F0 0F0 0B0 1B0 0R 1R"], "rank 0, action 1F0: deadlock: rank 0 waits in 1F0 for the activations"),
    ],
)
def test_a_refusal_names_rank_action_and_reason(rows: list[str], message: str) -> None:
    broken = table(*rows)
    if "" in rows:
        broken = Table([0], [broken.rows[0], []])
    assert refusal(broken).startswith(message)


def test_actions_of_a_stage_on_another_rank_are_refused() -> None:
    made = gpipe(2, 1)
    made.stage_to_rank = [1, 0]
    assert refusal(made) == "rank 0, action 0F0: stage 0 is on rank 1"
    made.stage_to_rank = [0, 5]
    assert refusal(made) == "rank 5: holds stage 1, but the table has 2 rows"


def test_a_deadlock_names_all_that_wait_and_whom_they_wait_for() -> None:
    text = refusal(table("0F0 0B0 0F1 0B1 0R", "1F0 1F1 1B0 1B1 1R"))
    assert text == (
        "rank 0, action 0B0: deadlock: "
        "rank 0 waits in 0B0 for the gradients from stage 1, microbatch 0 on rank 1; "
        "rank 1 waits in 1F1 for the activations from stage 0, microbatch 1 on rank 0"
    )


def test_a_receiver_may_use_messages_in_another_order_than_they_come() -> None:
    crossed = table("0F0 0F1 0B0 0B1 0R", "1F1 1B1 1F0 1B0 1R")
    check(crossed)
    receiver = programs(crossed)[1]
    assert [message.microbatch for message in receiver.incoming[0]] == [0, 1]


def test_another_order_of_messages_at_the_two_ends_is_refused() -> None:
    ranks = programs(gpipe(2, 2))
    ranks[1].incoming[0].reverse()
    with pytest.raises(ScheduleError, match=r"rank 1: expects .*microbatch 1 where rank 0 sends .*microbatch 0"):
        check_transfers(ranks)


def test_a_message_that_nobody_takes_is_refused() -> None:
    ranks = programs(gpipe(2, 1))
    ranks[1].steps.clear()
    ranks[0].steps.pop(1)
    with pytest.raises(ScheduleError, match="rank 0: sends the activations .* to rank 1, which never takes"):
        check_transfers(ranks)


def test_a_message_is_acknowledged_by_what_its_receiver_sends_later() -> None:
    for made in (one_f_one_b(4, 7), gpipe(3, 5), Table.from_csv(V_SPLIT)):
        ranks = programs(made)
        for program in ranks:
            for step in chain.from_iterable(program.steps):
                if step.acknowledged:
                    mine = ranks[step.takes.source].incoming[program.rank][: step.acknowledged]
                    sender = list(chain.from_iterable(ranks[step.takes.source].steps))
                    sending = next(i for i, s in enumerate(sender) if s.gives == step.takes)
                    taken = {s.takes for s in sender[: sending + 1]}
                    assert mine[-1] in taken, "the last one was taken, and those before it with it"
    assert [step.acknowledged for (step,) in programs(one_f_one_b(2, 2))[0].steps] == [0, 0, 1, 2, 0]


def damaged(original: Table, chance: random.Random) -> Table:
    """``original`` with one or two swaps, drops or duplicates."""
    rows = [list(row) for row in original.rows]
    for _ in range(chance.randint(1, 2)):
        row = chance.choice(rows)
        a, b = chance.randrange(len(row)), chance.randrange(len(row))
        kind = chance.choice(["swap", "swap", "drop", "duplicate"])
        if kind == "swap":
            row[a], row[b] = row[b], row[a]
        elif kind == "drop" and len(row) > 1:
            del row[a]
        else:
            row.insert(a, row[b])
    return Table(original.stage_to_rank, rows)


def can_run(broken: Table, original: Table) -> bool:
    """The same verdict by other means: same actions, and a graph of all dependencies without a cycle."""
    if any(sorted(a) != sorted(b) for a, b in zip(map(key, broken.rows), map(key, original.rows), strict=True)):
        return False
    actions = {action for row in original.rows for action in row}
    graph = graphlib.TopologicalSorter()
    for row in broken.rows:
        for before, after in itertools.pairwise(row):
            graph.add(after, before)
    for action in actions:
        graph.add(action, *(other for other in actions if depends(action, other)))
    try:
        graph.prepare()
    except graphlib.CycleError:
        return False
    return True


def key(row: list[Action]) -> list[str]:
    return [str(action) for action in row]


def depends(action: Action, other: Action) -> bool:
    if action.kind is Kind.R:
        return other.stage == action.stage and other.kind is not Kind.R
    backward = (Kind.B, Kind.I)
    if action.microbatch != other.microbatch:
        return False
    if action.kind is Kind.F:
        return other.kind is Kind.F and other.stage == action.stage - 1
    if action.kind in backward:
        same = other.stage == action.stage and other.kind is Kind.F
        return same or (other.stage == action.stage + 1 and other.kind in backward)
    return other.stage == action.stage and other.kind is Kind.I


def test_random_damage_is_refused_unless_the_table_can_still_run() -> None:
    chance = random.Random(1)
    verdicts = {True: 0, False: 0}
    for _ in range(1500):
        size = chance.randint(1, 4), chance.randint(1, 6)
        original = chance.choice([gpipe(*size), one_f_one_b(*size), Table.from_csv(V_SPLIT)])
        broken = damaged(original, chance)
        try:
            check(broken)
            accepted = True
        except ScheduleError:
            accepted = False
        assert accepted == can_run(broken, original), f"\n{broken}"
        verdicts[accepted] += 1
    assert min(verdicts.values()) > 50, "both verdicts must be met"
