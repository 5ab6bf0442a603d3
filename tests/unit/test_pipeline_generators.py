"""What every generator of schedules promises, for any number of ranks, chunks and microbatches."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from r1mega.config import SCHEDULE_NAMES, ConfigError, ParallelConfig
from r1mega.pipeline.actions import Action, Kind, Overlap, Table
from r1mega.pipeline.auto import peak_memory
from r1mega.pipeline.checker import check
from r1mega.pipeline.costs import Costs
from r1mega.pipeline.partition import Block
from r1mega.pipeline.schedules import (
    SCHEDULES,
    dualpipe,
    dualpipev,
    interleaved,
    looped_bfs,
    make_table,
    with_recomputation,
    zb_h1,
    zb_h2,
    zbv,
)
from r1mega.pipeline.simulator import simulate
from r1mega.pipeline.transfers import programs
from r1mega.train.schedule import build_table
from tests.unit import fake_transport
from tests.unit.fake_transport import execute

SMALL = list(itertools.product(range(1, 7), range(1, 9)))


def cells(table: Table, rank: int) -> list[tuple[Action, ...]]:
    return [tuple(cell) if isinstance(cell, Overlap) else (cell,) for cell in table.rows[rank]]


def assert_keeps_the_promises(table: Table, num_ranks: int, num_microbatches: int, chunks: int) -> None:
    assert (table.num_ranks, table.num_microbatches) == (num_ranks, num_microbatches)
    for rank in range(num_ranks):
        assert len(table.stages_of(rank)) == chunks
        row = cells(table, rank)
        for stage in table.stages_of(rank):
            for kinds in ((Kind.B, Kind.I), (Kind.W,), (Kind.B, Kind.W)):
                order = [a.microbatch for a in itertools.chain(*row) if a.stage == stage and a.kind in kinds]
                assert order == sorted(order), f"stage {stage} must add up gradients in the order of microbatches"
            reduction = row.index((Action(Kind.R, stage),))
            before = next(cell for cell in row[reduction::-1] if cell[0].kind is not Kind.R)
            work_left = any(a.stage == stage for cell in row[reduction + 1 :] for a in cell)
            assert not work_left
            assert any(a.stage == stage for a in before) or not table.microbatches_of(stage)


def random_costs(chance: random.Random, num_stages: int) -> Costs:
    """Different ones for each stage; some are nothing."""
    forward, backward_input, backward_weight, reduce = (
        [chance.choice([0.0, 0.3, 1.0, 2.5]) for _ in range(num_stages)] for _ in range(4)
    )
    communication, overlap = chance.choice([0.0, 0.2, 3.0]), chance.choice([0.7, 1.0, 1.2])
    return Costs(forward, backward_input, backward_weight, communication, overlap=overlap, reduce=reduce)


def test_ten_thousand_random_tables_are_accepted_run_and_hold_what_checker_and_simulator_say() -> None:
    chance = random.Random(2)
    sizes = []
    for _ in range(10_000):
        # small ones show every phase of a few ranks, and one large one takes as long as thirty of them
        num_ranks = chance.randint(1, 4) if chance.random() < 0.96 else chance.randint(5, 16)
        name, num_microbatches = chance.choice(list(SCHEDULES)), chance.randint(1, 3 * num_ranks)
        chunks = SCHEDULES[name].chunks or chance.randint(1, 4)
        made = make_table(name, num_ranks, num_microbatches, chunks)
        assert_keeps_the_promises(made, num_ranks, num_microbatches, chunks)
        if chance.random() < 0.1:
            made = with_recomputation(made)
        peaks = check(made).peak_activations
        work = execute(made, chance)
        work.assert_complete(made)
        assert work.peaks == peaks
        simulation = simulate(made, random_costs(chance, made.stages_per_copy))
        share = num_ranks / made.stages_per_copy
        assert all(abs(a - share * b) < 1e-9 for a, b in zip(simulation.peak_activations, peaks, strict=True))
        assert list(map(len, simulation.spans)) == list(map(len, made.rows))
        sizes.append((num_ranks, num_microbatches))
    assert sum(p <= m for p, m in sizes) > 6000 and sum(8 <= p <= m for p, m in sizes) > 150, "all phases are met"


@pytest.mark.parametrize("sabotage", ["the order of a pair of ranks", "an action", "a message", "a deadlock"])
def test_the_fake_transport_notices(sabotage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_table("1f1b", 3, 5)
    changed = programs(made)
    if sabotage == "the order of a pair of ranks":
        changed[1].incoming[0].reverse()
    elif sabotage == "an action":
        changed[2].steps.pop(-2)
    elif sabotage == "a deadlock":
        changed[1].steps.insert(0, changed[1].steps.pop(2))
    else:
        changed[0].steps[0] = (changed[0].steps[0][0]._replace(gives=None),)
    monkeypatch.setattr(fake_transport, "programs", lambda table: changed)
    for seed in range(5):
        with pytest.raises(AssertionError):
            execute(made, random.Random(seed)).assert_complete(made)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_small_size_runs_with_and_without_recomputation(name: str) -> None:
    for num_ranks, num_microbatches in SMALL:
        made = make_table(name, num_ranks, num_microbatches)
        check(made)
        assert_keeps_the_promises(made, num_ranks, num_microbatches, SCHEDULES[name].chunks or 2)
        check(with_recomputation(made))


def test_each_backward_is_computed_again_right_before_it_and_once_only() -> None:
    for name in SCHEDULES:
        again = with_recomputation(make_table(name, 4, 9))
        for rank in range(4):
            row = cells(again, rank)
            computed = [action for cell in row for action in cell if action.kind is Kind.C]
            assert len(computed) == len(set(computed)) == len([a for cell in row for a in cell if a.kind is Kind.F])
            for before, cell in itertools.pairwise(row):
                if cell[-1].kind in (Kind.B, Kind.I):
                    assert before == (cell[-1]._replace(kind=Kind.C),)
        assert with_recomputation(again) == again


def test_recomputation_leaves_one_microbatch_of_activations_where_the_backward_is_whole() -> None:
    for name in ("gpipe", "1f1b", "interleaved", "looped-bfs"):
        assert check(with_recomputation(make_table(name, 4, 9))).peak_activations == [1] * 4


def test_small_tables_are_these() -> None:
    assert str(interleaved(2, 2)) == (
        "rank 0: 0F0 0F1 2F0 2F1 2B0 2B1 2R  0B0 0B1 0R\nrank 1: 1F0 1F1 3F0 3B0 3F1 3B1 3R  1B0 1B1 1R"
    )
    assert str(looped_bfs(1, 2)) == "rank 0: 0F0 0F1 1F0 1F1 1B0 1B1 1R  0B0 0B1 0R"
    assert str(zb_h1(2, 3)) == (
        "rank 0: 0F0 0F1 0I0 0W0 0F2 0I1 0W1 0I2 0W2 0R\nrank 1: 1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2 1R"
    )
    assert str(zb_h2(2, 3)) == (
        "rank 0: 0F0 0F1 0F2 0I0 0W0 0I1 0W1 0I2 0W2 0R\nrank 1: 1F0 1I0 1F1 1I1 1F2 1I2 1W0 1W1 1W2 1R"
    )
    assert zbv(2, 3).to_csv() == (
        "0F0,0F1,0F2,3F0,3I0,3W0,3F1,3I1,3W1,0I0,0W0,3F2,3I2,0I1,3W2,3R,0I2,0W1,0W2,0R\n"
        "1F0,2F0,1F1,2F1,2I0,2W0,1F2,1I0,1W0,2F2,2I1,1I1,2I2,1I2,2W1,1W1,2W2,2R,1W2,1R\n"
    )
    assert dualpipe(2, 8).to_csv() == (
        "0F0,3F4,0F1,3B4,(3F5;0B0),(0F2;3B5),(3F6;0B1),(0F3;3B6),(3F7;0B2),3B7,3R,0I3,0W3,0R\n"
        "2F4,1F0,2F5,1B0,(1F1;2B4),(2F6;1B1),(1F2;2B5),(2F7;1B2),(1F3;2B6),1B3,1R,2I7,2W7,2R\n"
    )


def test_a_forward_overlaps_a_backward_of_the_other_stream_wherever_both_are_under_way() -> None:
    for made, pairs in ((dualpipe(8, 40), 20 - 4), (dualpipev(4, 20), 20 - 4)):
        for rank in range(made.num_ranks):
            overlaps = [cell for cell in made.rows[rank] if isinstance(cell, Overlap)]
            assert len(overlaps) >= 2 * (pairs - made.num_ranks // 2)
            assert all(forward.stage != backward.stage for forward, backward in overlaps)
            assert {backward.kind for _, backward in overlaps} == {Kind.B}


def loads_of(table: Table) -> Iterator[int]:
    return (sum(action.kind is Kind.F for action in table.actions(rank)) for rank in range(table.num_ranks))


def test_an_incomplete_group_of_interleaved_microbatches_adds_its_own_work_only() -> None:
    for num_ranks, num_microbatches in SMALL:
        assert set(loads_of(interleaved(num_ranks, num_microbatches, 3))) == {3 * num_microbatches}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("interleave", 2, 2), "there is no schedule 'interleave'; did you mean interleaved?"),
        (("ZBV", 2, 2), "there is no schedule 'ZBV'; did you mean zbv?"),
        (("?", 2, 2), "there is no schedule '?'; There are gpipe, 1f1b"),
        (("zbv", 2, 2, 3), "a rank of zbv holds 2 stages, not 3; interleaved and looped-bfs take any number of chunks"),
        (("1f1b", 2, 2, 2), "a rank of 1f1b holds 1 stage, not 2"),
        (("interleaved", 2, 2, 0), "a schedule needs a stage on each rank at least, not 0"),
        *(((name, 0, 2), "a schedule needs a rank at least, not 0") for name in SCHEDULES),
        *(((name, 2, 0), "a schedule needs a microbatch at least, not 0") for name in SCHEDULES),
    ],
)
def test_what_cannot_run_is_refused_with_what_would_fit(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make_table(*arguments)
    assert str(caught.value).startswith(message)


def test_the_settings_accept_every_schedule_by_name() -> None:
    assert (*SCHEDULES, "auto") == SCHEDULE_NAMES
    assert ParallelConfig(schedule="interleaved", chunks=3).chunks == 3
    with pytest.raises(ConfigError, match=r"^parallel.chunks=0: must be positive$"):
        ParallelConfig(schedule="interleaved", chunks=0)
    with pytest.raises(ConfigError, match=r"^parallel.chunks=3: zbv has its own number of stages a rank"):
        ParallelConfig(schedule="zbv", chunks=3)
    assert ParallelConfig(schedule="auto", memory_limit=2.5).memory_limit == 2.5
    with pytest.raises(ConfigError, match=r"^parallel.memory_limit=0.5: must be 1 or more$"):
        ParallelConfig(schedule="auto", memory_limit=0.5)
    with pytest.raises(ConfigError, match=r"^parallel.memory_limit=4: is for the schedule auto, not zbv$"):
        ParallelConfig(schedule="zbv", memory_limit=4)


def test_training_searches_within_its_memory_limit() -> None:
    blocks = [Block("t", number, 1.0) for number in range(4)]
    for limit in (2, 4, 7):
        parallel = ParallelConfig(pp=4, schedule="auto", memory_limit=limit)
        assert max(peak_memory(build_table(parallel, 8, blocks))) <= limit
    roomy, tight = (
        simulate(build_table(ParallelConfig(pp=4, schedule="auto", memory_limit=limit), 8, blocks), Costs(1, 1, 1))
        for limit in (7, 2)
    )
    assert roomy.makespan < tight.makespan
