"""The pool of rewards: one that does harm costs one sample that reward, is counted, and nothing else happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from r1mega.config import ConfigError
from r1mega.rl.rewards import RewardOptions, RewardPool, Sample, Scores, check_rewards
from r1mega.rl.rewards.processes import descendants

HOSTILE = "tests.unit.hostile_rewards:"
GOOD = HOSTILE + "good"


def options(*names: str, **settings: object) -> RewardOptions:
    return RewardOptions(names=[HOSTILE + name for name in names], **{"time_limit": 10.0, **settings})  # type: ignore[arg-type]


def alive() -> set[int]:
    """Processes below this one, and the orphans that call a file of this test's rewards their program."""
    return {process for process in descendants(os.getpid()) if _state(process) not in ("", "Z")}


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def marked(mark: str) -> set[int]:
    """Processes anywhere that have ``mark`` in their environment and are alive."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and mark.encode() in (folder / "environ").read_bytes():
                found.add(int(folder.name))
        except OSError:
            continue
    return {process for process in found if _state(process) not in ("", "Z")}


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """After each test: no thread, no child, no zombie, no orphan anywhere that came of it.

    What earlier tests have left may end meanwhile.
    """
    mark = f"REWARD_TEST={os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setenv(*mark.split("=", 1))
    threads, children = set(threading.enumerate()), set(descendants(os.getpid()))
    yield mark
    assert set(threading.enumerate()) <= threads
    deadline = time.monotonic() + 5
    while (left := marked(mark) - {os.getpid()}) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left
    assert set(descendants(os.getpid())) <= children


def score(chosen: RewardOptions, *completions: str, workers: int = 1, **data: object) -> tuple[list[Scores], dict]:
    with RewardPool(chosen, workers) as pool:
        futures = [pool.submit(Sample("", completion, data=data)) for completion in completions]
        return [future.result(60) for future in futures], pool.failures()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raises", "raised ValueError: bad input"),
        ("fails_in_its_own_words", "no reference: here"),
        ("leaves", "raised SystemExit: 3"),
        ("exits", "ended its process: exit status 0"),
        ("crashes", "died: SIGSEGV"),
        ("eats_memory", "ran out of memory: may allocate 256 MiB"),
        ("hangs", "took too long: more than 1 s"),
        ("hangs_deaf", "took too long: more than 1 s"),
        ("forks", "tried to start or signal a process: os.fork"),
        ("forks_past_the_guard", "left processes running"),
        ("leaves_a_daemon", "left processes running"),
        ("leaves_a_daemon_and_exits", "ended its process: exit status 7"),
        ("kills_its_watcher", "ended its process: and the one that watched it"),
        ("starts_a_thread", "left a thread running"),
        ("opens_a_socket", "tried to use the network: socket."),
        ("returns_nan", "returned nan: must be a finite number"),
        ("returns_text", "raised ValueError: could not convert string to float"),
        ("scribbles", "garbled its result"),
    ],
)
def test_a_harmful_reward_costs_its_sample_that_reward_and_is_counted(name: str, reason: str) -> None:
    limit = 1.0 if name.startswith("hangs") else 1.5 if name.startswith("leaves_a_daemon") else 10.0
    chosen = options(name, "good", time_limit=limit, memory_limit=256)
    (first, second), failures = score(chosen, "abc", "defg")
    for scores, value in ((first, 3.0), (second, 4.0)):
        assert scores.by_name == {HOSTILE + name: 0.0, GOOD: value} and scores.total == value
        assert list(scores.failures) == [HOSTILE + name]
        assert scores.failures[HOSTILE + name].startswith(reason)
    assert failures == {HOSTILE + name: {reason.partition(":")[0]: 2}}


def test_a_watcher_that_was_stopped_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1mega.rl.rewards.pool._GRACE", 0.5)
    (scores,), _ = score(options("stops_its_watcher", "good", time_limit=0.5), "abc")
    assert scores.by_name[GOOD] == 3.0
    assert scores.failures == {HOSTILE + "stops_its_watcher": "ended its process: and the one that watched it"}


@pytest.mark.parametrize("name", ["prints", "floods"])
def test_what_a_reward_prints_goes_nowhere(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    (scores,), failures = score(options(name), "")
    assert scores.total == 1.0 and not failures
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["writes_a_file", "writes_a_file_and_hides_it"])
def test_a_reward_that_writes_a_file_fails_also_if_it_hides_the_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / "written"
    (scores,), failures = score(options(name), "", path=str(path))
    assert scores.total == 0.0 and not path.exists()
    assert failures == {HOSTILE + name: {"tried to write a file": 1}}


def test_native_code_cannot_write_into_a_file_either(tmp_path: Path) -> None:
    (scores,), _ = score(options("writes_past_the_guard"), "", path=str(tmp_path / "written"))
    assert scores.total == -1.0 and (tmp_path / "written").stat().st_size == 0


def test_a_reward_may_do_what_it_is_marked_for(tmp_path: Path) -> None:
    chosen = options("may_write_files", "runs_a_program")
    (scores,), failures = score(chosen, "", path=str(tmp_path / "written"))
    assert list(scores.by_name.values()) == [4.0, 42.0] and not failures


def test_an_alarm_that_a_reward_leaves_does_not_hit_the_next() -> None:
    (scores,), failures = score(options("sets_an_alarm", "sleeps_a_little"), "")
    assert scores.total == 2.0 and not failures


def test_what_a_reward_does_to_its_sample_or_to_chance_reaches_no_other() -> None:
    chosen = options("changes_its_sample", "length_of_list", "random_number")
    results, _ = score(chosen, *"abcdef", list=[])
    assert {tuple(scores.by_name.values()) for scores in results} == {
        (1.0, 0.0, results[0].by_name[HOSTILE + "random_number"])
    }


def test_results_do_not_depend_on_the_number_of_workers_or_the_order() -> None:
    chosen = RewardOptions(
        names=[GOOD, HOSTILE + "random_number", HOSTILE + "raises", HOSTILE + "exits", "format"],
        weights=[1.0, 0.5, 1.0, 1.0, 2.0],
    )
    texts = [f"<think>{'x' * i}</think> <answer>{i}</answer>{' no' * (i % 3)}" for i in range(12)]
    alone, counted_alone = score(chosen, *texts)
    together, counted_together = score(chosen, *reversed(texts), workers=3)
    assert alone == together[::-1] and counted_alone == counted_together
    assert {scores.by_name["format"] for scores in alone} == {0.0, 1.0}


def test_the_total_is_the_weighted_sum_and_arguments_reach_the_reward() -> None:
    chosen = options(
        "good",
        "with_settings",
        weights=[1.0, -0.5],
        arguments={HOSTILE + "with_settings": {"factor": 2.0, "offset": 1.0}},
    )
    (scores,), _ = score(chosen, "abc")
    assert scores.by_name == {GOOD: 3.0, HOSTILE + "with_settings": 7.0}
    assert scores.total == 3.0 - 0.5 * 7.0


def test_the_children_do_not_import_torch() -> None:
    (scores,), _ = score(RewardOptions(names=[HOSTILE + "has_torch", "format", "language", "repetition"]), "")
    assert scores.by_name[HOSTILE + "has_torch"] == 0.0


def test_the_pool_works_off_the_main_thread() -> None:
    found: list[Scores] = []

    def work() -> None:
        found.extend(score(options("good"), "abc")[0])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert [scores.total for scores in found] == [3.0]


def test_any_text_reaches_the_reward_as_it_is() -> None:
    texts = ["", "\0\n\r\u2028", "北京 🚀", "\ud800 half a pair", "x" * (1 << 21)]
    results, failures = score(options("good"), *texts)
    assert [scores.total for scores in results] == [float(len(text)) for text in texts] and not failures


def test_closing_gives_up_what_is_not_done() -> None:
    pool = RewardPool(options("hangs", time_limit=60.0))
    futures = [pool.submit(Sample("", "")) for _ in range(3)]
    while not futures[0].running():
        time.sleep(0.01)
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 30
    assert all(future.cancelled() or future.exception() is not None for future in futures)
    with pytest.raises(RuntimeError):
        pool.submit(Sample("", ""))


def test_a_child_that_somebody_kills_is_replaced() -> None:
    of_others = set(descendants(os.getpid()))
    with RewardPool(options("good")) as pool:
        assert pool.submit(Sample("", "a")).result(60).total == 1.0
        for process in set(descendants(os.getpid())) - of_others:
            os.kill(process, signal.SIGKILL)
        assert pool.submit(Sample("", "ab")).result(60) == Scores(2.0, {GOOD: 2.0})


def test_nothing_is_left_when_the_trainer_is_killed(nothing_is_left: str) -> None:
    program = f"""
import sys, time
from r1mega.rl.rewards import RewardOptions, RewardPool, Sample
pool = RewardPool(RewardOptions(names=["{HOSTILE}good"]), 2)
pool.submit(Sample("", "a")).result()
print("ready", flush=True)
time.sleep(60)
"""
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=os.getcwd())
    assert trainer.stdout is not None and trainer.stdout.readline() == "ready\n"
    assert len(marked(nothing_is_left)) >= 4
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()


def test_nothing_is_left_when_the_trainer_is_killed_and_a_process_that_it_forked_goes_on(nothing_is_left: str) -> None:
    """A data loader's process holds the trainer's end of every channel, so that no channel closes."""
    program = f"""
import os, time
from r1mega.rl.rewards import RewardOptions, RewardPool, Sample
pool = RewardPool(RewardOptions(names=["{HOSTILE}good"]))
pool.submit(Sample("", "a")).result()
if forked := os.fork():
    print(forked, flush=True)
time.sleep(60)
"""
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=os.getcwd())
    assert trainer.stdout is not None
    forked = int(trainer.stdout.readline())
    try:
        trainer.kill()
        trainer.wait()
        deadline = time.monotonic() + 20
        while marked(nothing_is_left) - {os.getpid(), forked} and time.monotonic() < deadline:
            time.sleep(0.05)
        assert marked(nothing_is_left) - {os.getpid()} == {forked}
    finally:
        os.kill(forked, signal.SIGKILL)
        trainer.stdout.close()


def test_leaving_the_program_without_closing_is_quiet() -> None:
    program = f"""
from r1mega.rl.rewards import RewardOptions, RewardPool, Sample
pool = RewardPool(RewardOptions(names=["{HOSTILE}good"]), 2)
print(pool.submit(Sample("", "abc")).result().total)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3.0\n", "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": ["acuracy"]}, "rewards.names=acuracy: must be accuracy, code, "),
        ({"names": []}, "rewards.names=[]: name at least one of accuracy, "),
        ({"names": ["format", "format"]}, "rewards.names=format,format: must not name a reward twice"),
        ({"weights": [1.0]}, "rewards.weights=[1.0]: must have one weight for each of rewards.names (2), or none"),
        ({"weights": [1.0, float("nan")]}, "rewards.weights=[1.0, nan]: must be finite"),
        ({"arguments": {"length": {}}}, "rewards.arguments=length: must be among rewards.names (accuracy,format)"),
        ({"time_limit": 0.0}, "rewards.time_limit=0.0: must be positive and finite"),
        ({"memory_limit": -1}, "rewards.memory_limit=-1: must be positive"),
    ],
)
def test_options_that_cannot_work_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RewardOptions(**settings)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("nowhere.at_all:f", {}, "rewards.names=nowhere.at_all:f: cannot import nowhere.at_all: ModuleNotFoundError"),
        (
            HOSTILE + "missing",
            {},
            f"rewards.names={HOSTILE}missing: tests.unit.hostile_rewards has no function missing",
        ),
        (
            HOSTILE + "not_a_function",
            {},
            f"rewards.names={HOSTILE}not_a_function: tests.unit.hostile_rewards has no fun",
        ),
        (
            HOSTILE + "with_settings",
            {},
            f"rewards.arguments.{HOSTILE}with_settings: missing a required argument: 'facto",
        ),
        ("format", {"strict": 1}, "rewards.arguments.format: got an unexpected keyword argument 'strict'; it takes no"),
        ("language", {"target": "xx"}, "rewards.arguments.language.target=xx: must be en, zh, "),
        (
            "length",
            {"max_length": 5, "buffer": 9},
            "rewards.arguments.length.buffer=9: must be between 1 and max_length",
        ),
        ("repetition", {"ngram": 0}, "rewards.arguments.repetition.ngram=0: must be positive"),
        ("accuracy", {"source": "x"}, "rewards.arguments.accuracy.source=x: must be answer or text"),
    ],
)
def test_rewards_that_cannot_run_are_named_before_the_run(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_rewards(RewardOptions(names=[name], arguments={name: arguments}))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample("", 3), "sample.completion=3: must be text"),  # type: ignore[arg-type]
        (Sample("", "", 72), "sample.reference=72: must be text, or None"),  # type: ignore[arg-type]
        (Sample("", "", data={"tensor": object()}), "sample.data: Object of type object is not JSON serializable"),
    ],
)
def test_a_sample_that_cannot_be_sent_is_named(sample: Sample, message: str) -> None:
    with RewardPool(options("good")) as pool, pytest.raises(ValueError, match=message):
        pool.submit(sample)


def test_the_pool_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(options("good"), "abc")
