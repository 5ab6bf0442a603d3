"""Schedule tables and the checker."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from itertools import chain

import pytest

from r1mega.pipeline.actions import PER_STEP, Action, Kind, Overlap, ScheduleError, Table
from r1mega.pipeline.checker import check, check_transfers
from r1mega.pipeline.schedules import SCHEDULES, gpipe, make_table, one_f_one_b, with_recomputation
from r1mega.pipeline.transfers import programs
from tests.unit.fake_transport import execute

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


def test_one_f_one_b_peak_activations_equal_the_distance_to_the_end_of_the_pipeline() -> None:
    for p, m in itertools.product(range(1, 9), range(1, 13)):
        assert check(one_f_one_b(p, m)).peak_activations == [min(p - rank, m) for rank in range(p)]


def test_gpipe_peak_activations_equal_the_number_of_microbatches() -> None:
    for p, m in itertools.product(range(1, 9), range(1, 13)):
        assert check(gpipe(p, m)).peak_activations == [m] * p


def test_activations_of_a_split_backward_are_held_until_the_weight_gradient() -> None:
    assert check(table("0F0 0I0 0F1 0I1 0W0 0W1 0R")).peak_activations == [2]


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
        (["(0F0;0B0) 0R"], "rank 0, action 0B0: overlaps its own forward, 0F0"),
        (["0F0 0B0 0C0 0R"], "rank 0, action 0B0: comes before 0C0"),
        (["0F0 0B0 0O 0R"], "rank 0, action 0O: comes before 0R"),
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
    """``original`` with one or two swaps, drops, duplicates or overlaps taken apart, some of them between rows."""
    rows = [list(row) for row in original.rows]
    for _ in range(chance.randint(1, 2)):
        row = chance.choice(rows)
        other = chance.choice(rows) if chance.random() < 0.1 else row
        a, b = chance.randrange(len(row)), chance.randrange(len(other))
        kind = chance.choice(["swap", "swap", "drop", "duplicate", "move"])
        if isinstance(row[a], Overlap) and chance.random() < 0.2:
            row[a : a + 1] = row[a]
        elif kind == "swap":
            row[a], other[b] = other[b], row[a]
        elif kind == "drop" and len(row) > 1:
            del row[a]
        elif kind == "move" and len(row) > 1:
            other.insert(b, row.pop(a))
        else:
            other.insert(b, row[a])
    return Table(original.stage_to_rank, rows, original.num_copies)


def read_damaged(original: Table, chance: random.Random) -> Table:
    """The same in a file, where a line may be lost, too; stages are then where the file has them."""
    broken = damaged(original, chance)
    lines = broken.to_csv().splitlines()
    if len(lines) > 1 and chance.random() < 0.3:
        del lines[chance.randrange(len(lines))]
    return Table.from_csv("\n".join(lines))


def completes(broken: Table, original: Table) -> bool:
    """The same verdict by other means: the ranks do the same actions as before, and none waits for ever.

    A recomputation may go: the forward then keeps what the backward needs. Runs the rows in rounds, an action as soon
    as all that it needs was done in an earlier cell of any rank.
    """
    if any(counted(broken, rank) != counted(original, rank) for rank in range(original.num_ranks)):
        return False
    if any(original.stage_to_rank[a.stage] != rank for rank in range(broken.num_ranks) for a in broken.actions(rank)):
        return False
    everything = {action for rank in range(broken.num_ranks) for action in broken.actions(rank)}
    cells = [[tuple(cell) if isinstance(cell, Overlap) else (cell,) for cell in row] for row in broken.rows]
    done: set[Action] = set()
    moved = True
    while moved:
        moved = False
        for row in cells:
            while row and all(done.issuperset(needs(action, everything, original)) for action in row[0]):
                done.update(row.pop(0))
                moved = True
    return done == everything


def counted(table: Table, rank: int) -> Counter[Action]:
    """How often a rank does each action, but for recomputations that it does once."""
    counts = Counter(table.actions(rank))
    return Counter({action: count for action, count in counts.items() if action.kind is not Kind.C or count > 1})


def needs(action: Action, everything: set[Action], table: Table) -> Iterator[Action]:
    kind, stage, microbatch = action
    if kind is Kind.R:
        yield from (other for other in everything if other.stage == stage and other.kind not in PER_STEP)
    wanted = {
        Kind.F: [(Kind.F, table.previous_stage(stage))],
        Kind.C: [(Kind.F, stage)],
        Kind.W: [(Kind.I, stage)],
    }.get(
        kind, [(Kind.F, stage), (Kind.C, stage), (Kind.B, table.next_stage(stage)), (Kind.I, table.next_stage(stage))]
    )
    yield from (other for each, at in wanted if (other := Action(each, at, microbatch)) in everything)


def test_random_damage_is_refused_unless_the_table_can_still_run() -> None:
    chance = random.Random(1)
    verdicts: Counter[str] = Counter()
    for _ in range(6000):
        name = chance.choice([*SCHEDULES, "by hand"])
        original = Table.from_csv(V_SPLIT)
        if name != "by hand":
            original = make_table(name, chance.randint(1, 4), chance.randint(1, 6))
        if chance.random() < 0.2:
            original = with_recomputation(original)
        broken = None
        try:
            broken = (read_damaged if chance.random() < 0.5 else damaged)(original, chance)
            check(broken)
        except ScheduleError:
            if broken is not None and shape(broken) == shape(original):
                assert not completes(broken, original), f"refused:\n{broken}"
            verdicts["refused"] += 1
            continue
        execute(broken, chance).assert_complete(broken)
        if shape(broken) == shape(original):
            assert completes(broken, original), f"accepted:\n{broken}"
            verdicts["accepted"] += 1
        else:  # a good table, but for other ranks or microbatches than are there: executor and training refuse it
            assert shape(broken)[:2] != shape(original)[:2], f"\n{original}\nbecame\n{broken}"
            verdicts["a whole table of another size"] += 1
    assert min(verdicts.values()) > 15 and min(verdicts["refused"], verdicts["accepted"]) > 300, verdicts


def shape(table: Table) -> tuple[int, int, int, list[int]]:
    return table.num_ranks, table.num_microbatches, table.num_copies, table.stage_to_rank
