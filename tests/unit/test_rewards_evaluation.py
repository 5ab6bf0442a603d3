"""What is measured of a model that reasons."""

from __future__ import annotations

import itertools

import pytest

from r1mega.rl.evaluation import (
    cons_at_k,
    majority,
    mean_length,
    pass_at_1,
    pass_at_k,
    reflection_counts,
    reflection_words,
)


def test_pass_at_1_is_the_mean_over_prompts() -> None:
    assert pass_at_1([[True, False], [True, True], [False, False]]) == 0.5
    assert pass_at_1([[True], [False, False, False]]) == 0.5


@pytest.mark.parametrize(("n", "c"), [(5, 0), (5, 1), (5, 3), (5, 5), (8, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(n: int, c: int) -> None:
    samples = [i < c for i in range(n)]
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k([samples], k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_needs_k_samples() -> None:
    with pytest.raises(ValueError, match=r"k=3: must be between 1 and the number of samples of each prompt \(2\)"):
        pass_at_k([[True, True, True], [True, False]], 3)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        pass_at_1([])


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["1", "2", "2"], 1),
        (["1", "2", "2", "1"], 0),
        ([None, "2", None, None], 1),
        (["72", "7", "$72$", "7 "], 0),
        (["7", "72", "$72$"], 1),
        ([None, None], None),
        ([], None),
    ],
)
def test_the_majority_is_the_most_frequent_answer_and_of_equals_the_first(
    answers: list[str | None], winner: int | None
) -> None:
    assert majority(answers) == winner


def test_cons_at_k_counts_prompts_whose_majority_is_correct() -> None:
    answers = [["7", "8", "7"], ["1", "2", "2"], [None, None, None]]
    correct = [[True, False, True], [True, False, False], [False, False, False]]
    assert cons_at_k(answers, correct) == 1 / 3
    assert cons_at_k(answers, correct, k=2) == 2 / 3
    assert cons_at_k(answers, correct, k=1) == pass_at_1([samples[:1] for samples in correct])
    with pytest.raises(ValueError, match="same shape"):
        cons_at_k([["7"]], [[True, False]])


def test_reflection_words_are_whole_words() -> None:
    counts = reflection_counts("Wait, wait! Rechecking... let me recheck; butter is an error. Double-check it.")
    assert {word: count for word, count in counts.items() if count} == {
        "wait": 2,
        "recheck": 1,
        "error": 1,
        "double-check": 1,
    }
    assert reflection_words(["wait, wait", "no", "but why"]) == 1.0


def test_mean_length() -> None:
    assert mean_length([1, 2, 6]) == 3.0
