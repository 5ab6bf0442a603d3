"""Schedules against published figures: bubble rates, bubble formulas, peak activations.

The bubble rates are those of the Zero Bubble paper (arXiv 2401.10241) and of its authors' schedulers, which leave out
the waiting at both ends of a rank (:attr:`Simulation.bubble_rate`).
"""

from __future__ import annotations

import pytest

from r1mega.pipeline.checker import check
from r1mega.pipeline.costs import Costs
from r1mega.pipeline.schedules import make_table
from r1mega.pipeline.simulator import Simulation, simulate

# ranks, microbatches, F, I, W, communication in ms
MODELS = {
    "1.5B, 24 microbatches": (8, 24, 18.522, 18.086, 9.337, 0.601),
    "1.5B, 32 microbatches": (8, 32, 18.513, 18.086, 9.331, 0.626),
    "1.5B, 64 microbatches": (8, 64, 18.546, 18.097, 9.321, 0.762),
    "14.6B, 48 microbatches": (16, 48, 11.347, 11.248, 8.132, 0.377),
}
MEASURED_COSTS = [
    (schedule, model, rate)
    for model, rates in zip(
        MODELS,
        [(0.2431, 0.1585, 0.1083), (0.1985, 0.1242, 0.0837), (0.1240, 0.0674, 0.0444), (0.2552, 0.1397, 0.0672)],
        strict=True,
    )
    for schedule, rate in zip(("1f1b", "zb-h1", "zb-h2"), rates, strict=True)
]


def simulated(
    schedule: str, num_ranks: int, num_microbatches: int, *times: float, chunks: int | None = None
) -> Simulation:
    """``times``: F, I, W of a rank's layers and the communication; all 1 and none by default."""
    made = make_table(schedule, num_ranks, num_microbatches, chunks)
    return simulate(made, Costs.of_rank(*(times or (1, 1, 1)), chunks=made.stages_per_copy / num_ranks))


@pytest.mark.parametrize(("schedule", "model", "rate"), MEASURED_COSTS)
def test_bubble_rates_of_the_zero_bubble_paper(schedule: str, model: str, rate: float) -> None:
    assert f"{simulated(schedule, *MODELS[model]).bubble_rate:.4f}" == f"{rate:.4f}"


@pytest.mark.parametrize(("model", "rate"), list(zip(MODELS, (0.1055, 0.0818, 0.0443, 0.1104), strict=True)))
def test_bubble_rates_of_interleaved_1f1b_without_the_communication_of_one_round(model: str, rate: float) -> None:
    p, m, *times, communication = MODELS[model]
    done = simulated("interleaved", p, m, *times, communication, chunks=3)
    assert f"{1 - m * sum(times) / (done.longest_rank - p * communication):.4f}" == f"{rate:.4f}"


@pytest.mark.parametrize(
    ("num_ranks", "num_microbatches", "schedule", "rate", "whole"),
    [
        (p, m, schedule, *(rate if isinstance(rate, tuple) else (rate, rate)))
        for p, m, rates in (
            (4, 8, (0.2727, (0, 0.0588), 0.0943, 0.1864)),
            (8, 16, (0.3043, (0, 0.0680), 0.1504, 0.2195)),
            (8, 32, (0.1795, (0, 0.0352), 0.0813, 0.1233)),
        )
        for schedule, rate in zip(("1f1b", "zbv", "v-half", "v-min"), rates, strict=True)
    ],
)
def test_bubble_rates_at_unit_costs(
    num_ranks: int, num_microbatches: int, schedule: str, rate: float, whole: float
) -> None:
    done = simulated(schedule, num_ranks, num_microbatches)
    assert f"{done.bubble_rate:.4f}" == f"{rate:.4f}"
    assert f"{done.bubble_rate_makespan:.4f}" == f"{whole:.4f}"


BUBBLES = {
    "gpipe": lambda p, f, i, w: (p - 1) * (f + i + w),
    "1f1b": lambda p, f, i, w: (p - 1) * (f + i + w),
    "interleaved": lambda p, f, i, w: (p - 1) * (f + i + w) / 2,
    "looped-bfs": lambda p, f, i, w: (p - 1) * (f + i + w) / 2,
    "zb-h1": lambda p, f, i, w: (p - 1) * (f + i - w),
    "zb-h2": lambda p, f, i, w: (p - 1) * (f + i - 2 * w),
}


@pytest.mark.parametrize("times", [(1, 1, 1), (2, 2, 1.5), (3, 2, 1)])
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("schedule", BUBBLES)
def test_the_longest_rank_idles_as_the_formula_says(schedule: str, num_ranks: int, times: tuple[float, ...]) -> None:
    done = simulated(schedule, num_ranks, 3 * num_ranks, *times)
    assert done.longest_rank - done.busy[0] == pytest.approx(BUBBLES[schedule](num_ranks, *times))


@pytest.mark.parametrize("overlap", [1.0, 0.8, 1.2])
@pytest.mark.parametrize("rounds", [2, 3, 5])
@pytest.mark.parametrize("num_stages", [2, 4, 6, 8, 16])
@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_the_middle_rank_of_dualpipe_idles_as_the_formula_says(
    schedule: str, num_stages: int, rounds: int, overlap: float
) -> None:
    half = num_stages // 2
    size = (num_stages, rounds * num_stages) if schedule == "dualpipe" else (half, rounds * half)
    done = simulate(make_table(schedule, *size), Costs(1, 1, 1, overlap=overlap))
    bubble = (half - 1) * (overlap * 3 + 2 - 3)
    assert done.makespan - done.busy[half - 1] == pytest.approx(bubble)
    if overlap == 1.0:
        assert {done.makespan - busy for busy in done.busy} == {bubble}


PEAKS = {
    "gpipe": lambda p, m: m,
    "1f1b": lambda p, m: p,
    "interleaved": lambda p, m: p * (1 + (p - 1) / (2 * p)),
    "looped-bfs": lambda p, m: m,
    "zb-h1": lambda p, m: p,
    "zb-h2": lambda p, m: 2 * p - 1,
    "zbv": lambda p, m: p,
    "v-half": lambda p, m: (p + 2) // 2,
    "v-min": lambda p, m: (p + 4) // 3,
    "dualpipe": lambda p, m: p + 1 + p % 2,  # an odd number of ranks runs as the next even one
    "dualpipev": lambda p, m: (2 * p + 1) / 2,  # 2p + 1 of its 2p stages, two of which are a rank's layers
}


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5, 6, 7, 8, 9, 12, 16])
@pytest.mark.parametrize("schedule", PEAKS)
def test_peak_activations_are_as_published(schedule: str, num_ranks: int) -> None:
    num_microbatches = 3 * num_ranks
    made = make_table(schedule, num_ranks, num_microbatches)
    pairs = max(check(made).peak_activations)
    assert pairs * num_ranks / made.stages_per_copy == PEAKS[schedule](num_ranks, num_microbatches)


def test_only_dualpipe_holds_more_than_one_share_of_the_weights() -> None:
    for schedule in PEAKS:
        assert simulated(schedule, 4, 8).weights == [2.0 if schedule == "dualpipe" else 1.0] * 4
