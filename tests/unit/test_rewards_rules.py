"""The rules themselves: what each reward gives for which completion."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest

from r1mega.rl.rewards import RewardFailure, RewardOptions, RewardPool, Sample
from r1mega.rl.rewards.accuracy import accuracy, same_answer
from r1mega.rl.rewards.answers import extract_answer, extract_program, normalise
from r1mega.rl.rewards.definition import BUILT_IN, resolve
from r1mega.rl.rewards.format import format_reward
from r1mega.rl.rewards.language import language, word_scripts
from r1mega.rl.rewards.length import length
from r1mega.rl.rewards.reasoning_gym_tasks import UNSOUND, reasoning_gym_task
from r1mega.rl.rewards.repetition import repetition
from tools.make_prompts import reasoning_gym_prompts


def answered(answer: str, reference: str | None = None, **data: object) -> Sample:
    return Sample("What is 8 times 9?", f"<think>8 * 9 = 72</think> <answer>{answer}</answer>", reference, data)


@pytest.mark.parametrize(
    ("completion", "answer", "text"),
    [
        ("<think>a</think> <answer> 72 </answer>", "72", "72"),
        ("<answer>1</answer> no, <answer>2</answer>", "2", "2"),
        ("<answer>1 <answer>2</answer>", "2", "2"),
        ("<think><answer>1</answer></think> it is 3", None, "it is 3"),
        ("<think><answer>1</answer></think><answer>3</answer>", "3", "3"),
        ("<think>1</think> so \\boxed{\\frac{1}{2}}.", None, "\\frac{1}{2}"),
        ("\\boxed{1} or \\boxed{2", None, "\\boxed{1} or \\boxed{2"),
        ("</answer>72<answer>", None, "</answer>72<answer>"),
        ("<answer></answer>", "", ""),
        ("", None, None),
    ],
)
def test_the_answer_is_the_content_of_the_last_answer_tag(
    completion: str, answer: str | None, text: str | None
) -> None:
    assert extract_answer(completion) == answer
    assert extract_answer(completion, source="text") == text


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("72", " 72. "),
        ("+72", "$72$"),
        ("1,234,567", "1234567"),
        ("(1, 2)", "(1,2)"),
        ("\\boxed{72}", "\\(72\\)"),
        ("\\dfrac{1}{2}", "\\frac{1}{2}"),
        ("−3", "-3"),
        ("Tuesday", "tuesday"),
        ("\\text{New  York}", "new york"),
        ("x + 1", "x+1"),
    ],
)
def test_answers_that_differ_in_form_only_are_the_same(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)
    assert same_answer(one, other, symbolic=False)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("12", "1,2"),
        ("x^2", "X^2"),
        ("0.5", "5"),
        ("(1,2)", "(2,1)"),
        ("1,23", "123"),
        ("", ""),
        ("7 2", "72"),
        ("A", "a"),
    ],
)
def test_answers_that_differ_in_more_are_not(one: str, other: str) -> None:
    assert not same_answer(one, other, symbolic=False)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("\\frac{1}{2}", "0.5", True),
        ("1/2", "0.50", True),
        ("1+x^2", "x^2+1", True),
        ("(1, \\frac{4}{2})", "(1,2)", True),
        ("72 \\text{ apples}", "72", True),
        ("\\sqrt{2}", "2^{1/2}", True),
        ("(2,1)", "(1,2)", False),
        ("72 or 73", "72", False),
        ("73 or 72", "72", False),
        ("73$ or $72", "72", False),
        ("73", "72", False),
        ("0.333", "1/3", False),
        ("pairs", "Paris", False),
        ("", "72", False),
        ("(" * 3000, "72", False),
        ("__import__('os').system('echo 72')", "72", False),
    ],
)
def test_accuracy_compares_text_then_numbers_then_formulas(answer: str, reference: str, expected: bool) -> None:
    pytest.importorskip("math_verify")
    assert accuracy(answered(answer, reference)) == float(expected)


def test_math_verify_is_asked_in_a_child_that_can_be_killed() -> None:
    """9^9^9^9 is more than a life's work for it."""
    pytest.importorskip("math_verify")
    with RewardPool(RewardOptions(names=["accuracy"], time_limit=4.0), 2) as pool:
        texts = ["\\frac{144}{2}", "9^{9^{9^9}}", "73-1"]
        futures = [pool.submit(answered(text, "72")) for text in texts]
        assert [future.result(60).total for future in futures] == [1.0, 0.0, 1.0]
        assert pool.failures() == {"accuracy": {"took too long": 1}}


def test_math_verify_works_in_any_thread_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("math_verify")
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(accuracy, answered("\\frac{144}{2}", "72")).result() == 1.0
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_accuracy_without_a_reference_is_a_failure_not_a_zero() -> None:
    with pytest.raises(RewardFailure):
        accuracy(answered("72"))


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("<think>a</think> <answer>b</answer>", 1),
        ("\n<think>a\n\nb</think>\n<answer>c\n</answer>\n", 1),
        ("<think></think><answer></answer>", 1),
        ("<think>a</think> so <answer>b</answer>", 0),
        ("so <think>a</think> <answer>b</answer>", 0),
        ("<think>a</think> <answer>b</answer>.", 0),
        ("<think>a</think> <answer>b</answer><answer>c</answer>", 0),
        ("<think>a</think><think>a</think> <answer>b</answer>", 0),
        ("<answer>b</answer> <think>a</think>", 0),
        ("<think>a <answer>b</answer></think>", 0),
        ("<think>a<answer></think>b</answer>", 0),
        ("<think>a</think> <answer>b", 0),
        ("a</think> <answer>b</answer>", 0),
        ("", 0),
    ],
)
def test_format_is_each_tag_once_in_order_and_nothing_outside(completion: str, value: int) -> None:
    assert format_reward(Sample("<think> </think> are tags", completion)) == value


def test_a_prompt_that_opens_the_thinking_counts_for_the_format() -> None:
    assert format_reward(Sample("…<｜Assistant｜><think>\n", "a</think> <answer>b</answer>")) == 1
    assert format_reward(Sample("…<｜Assistant｜><think>\n", "<think>a</think> <answer>b</answer>")) == 0


@pytest.mark.parametrize(
    ("text", "target", "value"),
    [
        ("We add the numbers, don't we?", "en", 1.0),
        ("we add 三 numbers", "en", 3 / 4),
        ("我们把 x 和 y 相加: \\frac{a}{b} = 7", "zh", 1.0),
        ("我们 add 数", "zh", 3 / 4),
        ("これは日本語です", "ja", 1.0),
        ("これは日本語です", "zh", 3 / 8),
        ("сложим два числа", "ru", 1.0),
        ("12 + 7 = 19", "en", 0.0),
        ("", "en", 0.0),
    ],
)
def test_language_is_the_share_of_words_in_the_script_of_the_language(text: str, target: str, value: float) -> None:
    assert language(Sample("", f"<think>{text}</think> <answer>другой 语言 language</answer>"), target) == value
    assert language(Sample("", text), target) == value


def test_language_counts_words_of_any_script() -> None:
    assert list(word_scripts("naïve 北京 ひ Ωμέγα ไท สวัสดี한국어 שלום नमस्ते ქარ")) == (
        ["latin", "han", "han", "kana", "greek"] + ["thai"] * 8 + ["hangul", "hebrew", "devanagari"] + ["other"] * 3
    )


def test_length_follows_the_soft_overlong_punishment() -> None:
    lengths = [0, 80, 81, 90, 100, 101, 5000]
    values = [length(answered("", num_tokens=n), max_length=100, buffer=20) for n in lengths]
    assert values == [0.0, 0.0, -0.05, -0.5, -1.0, -1.0, -1.0]
    with pytest.raises(RewardFailure):
        length(answered(""), max_length=100, buffer=20)


def test_repetition_is_minus_the_share_of_repeated_ngrams() -> None:
    assert repetition(Sample("", "a b c d e"), ngram=2) == 0.0
    assert repetition(Sample("", "a b a b a"), ngram=2) == 2 / 4 - 1
    assert repetition(Sample("", "一二一二一"), ngram=2) == 2 / 4 - 1
    assert repetition(Sample("", "a b"), ngram=3) == 0.0
    assert repetition(Sample("", "so it is " * 500)) < -0.99


def test_reasoning_gym_gives_no_partial_credit() -> None:
    (problem,) = reasoning_gym_prompts(["chain_sum"], 1, 1, {})
    data = json.loads(json.dumps({"task": problem["task"], "entry": problem["entry"]}))
    gold = problem["reference"]
    answers = {gold: 1.0, f"{gold} or so": 0.0, "": 0.0, "junk": 0.0}
    assert {answer: reasoning_gym_task(answered(answer, **data)) for answer in answers} == answers
    assert reasoning_gym_task(Sample("", gold, None, data)) == 0.0
    assert reasoning_gym_task(Sample("", gold, None, data), source="text") == 1.0


def test_a_scorer_that_raises_on_junk_is_a_counted_failure() -> None:
    (problem,) = reasoning_gym_prompts(["prime_factorization"], 1, 1, {})
    data = {"task": problem["task"], "entry": problem["entry"]}
    with RewardPool(RewardOptions(names=["reasoning_gym"])) as pool:
        right, junk = (pool.submit(answered(text, **data)) for text in (problem["reference"], "junk"))
        assert (right.result(60).total, junk.result(60).total) == (1.0, 0.0)
        assert pool.failures() == {"reasoning_gym": {"raised ValueError": 1}}


@pytest.mark.parametrize("task", sorted(UNSOUND))
def test_unsound_tasks_are_refused(task: str) -> None:
    with pytest.raises(RewardFailure, match="unsound task"):
        reasoning_gym_task(answered("True", task=task, entry={}))


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("<think>```python\nno\n```</think> <answer>```python\nx = 1\n```</answer>", "x = 1\n"),
        ("```python\nx = 1\n```\nbetter:\n```py\nx = 2\n```", "x = 2\n"),
        ("</think>\n```\nx = 1\n```", "x = 1\n"),
        ("<answer>x = 1</answer>", "x = 1"),
    ],
)
def test_the_program_is_the_last_block_of_the_answer(completion: str, program: str) -> None:
    assert extract_program(completion) == program


def test_every_built_in_reward_is_there_and_says_what_it_needs() -> None:
    assert all(resolve(name).function.__doc__ for name in BUILT_IN)
    assert RewardOptions(names=["accuracy", "code", "format"]).needs() == ["reference", "tests|cases"]
