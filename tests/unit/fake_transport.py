"""Runs a table in one thread and without tensors, over queues in memory: what the executor does, thousands of times.

A message carries how many stages it has come through. Each action looks whether it got the right one, whether the work
before it was done, and whether both ends agree on the order, and fails with AssertionError where not. Nothing is shared
with the checker but the programs.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from r1mega.pipeline.actions import PER_STEP, Action, Kind, Table
from r1mega.pipeline.transfers import Message, Program, Step, programs

Key = tuple[int, int]  # stage, microbatch


@dataclass
class Work:
    """What a run did.

    Attributes:
        peaks: for each rank the most (stage, microbatch) pairs that it held at once, for I and W or B.
        done: the (stage, microbatch) pairs of each kind of action but R and O, in the order of their end.
        reduced: the stages of the R actions.
    """

    peaks: list[int]
    done: dict[Kind, list[Key]] = field(default_factory=lambda: {kind: [] for kind in Kind})
    reduced: list[int] = field(default_factory=list)

    def assert_complete(self, table: Table) -> None:
        """Every stage ran forward, backward by its inputs and by its weights once for each microbatch, and R once."""
        count = table.num_microbatches
        of_copy = [[m for m in range(count) if m * table.num_copies // count == c] for c in range(table.num_copies)]
        everything = {(s, m) for s in range(table.num_stages) for m in of_copy[s // table.stages_per_copy]}
        for kinds in ((Kind.F,), (Kind.B, Kind.I), (Kind.B, Kind.W)):
            found = [key for kind in kinds for key in self.done[kind]]
            assert len(found) == len(everything) and set(found) == everything, f"{kinds} of\n{table}"
        assert sorted(self.reduced) == list(range(table.num_stages))


def execute(table: Table, chance: random.Random) -> Work:
    """Run ``table``; ``chance`` decides whose turn it is and which pairs of ranks pass messages by rendezvous.

    Without rendezvous a message is with its receiver as soon as it was sent. With it, it stays with its sender until
    the receiver asks for it or a later one.
    """
    return _Run(table, chance).work


class _Run:
    def __init__(self, table: Table, chance: random.Random) -> None:
        ranks = programs(table)
        self.table, self.depth = table, table.stages_per_copy
        self.work = Work([0] * len(ranks))
        pairs = [(source, program.rank) for program in ranks for source in program.incoming]
        self.outbox: dict[tuple[int, int], deque[tuple[Message, int]]] = {pair: deque() for pair in pairs}
        self.rendezvous = {pair: chance.random() < 0.5 for pair in pairs}
        self.expected = {(source, p.rank): deque(queue) for p in ranks for source, queue in p.incoming.items()}
        self.inbox: list[dict[Message, int]] = [{} for _ in ranks]
        self.received = dict.fromkeys(pairs, 0)
        steps = (step for program in ranks for together in program.steps for step in together)
        self.recomputed = {step.action[1:] for step in steps if step.action.kind is Kind.C}
        self.inputs: list[set[Key]] = [set() for _ in ranks]  # of forwards that will be computed again
        self.saved: list[set[Key]] = [set() for _ in ranks]  # for the B or I
        self.pending: list[set[Key]] = [set() for _ in ranks]  # for the W
        self._until_all_end(ranks, chance)
        for held in (*self.outbox.values(), *self.inbox, *self.inputs, *self.saved, *self.pending):
            assert not held, f"{held} is left over"

    def _until_all_end(self, ranks: list[Program], chance: random.Random) -> None:
        position = [0] * len(ranks)
        running = list(ranks)
        while running:
            moved = False
            for program in chance.sample(running, len(running)):
                rank, start = program.rank, position[program.rank]
                end = min(len(program.steps), start + chance.choice((1, 2, 5, 1000)))
                while position[rank] < end and self._run(rank, program.steps[position[rank]]):
                    position[rank] += 1
                moved |= position[rank] > start
            waiting = {p.rank: p.steps[position[p.rank]] for p in running if position[p.rank] < len(p.steps)}
            assert moved, f"these wait for ever: {waiting}"
            running = [ranks[rank] for rank in waiting]

    def _run(self, rank: int, together: tuple[Step, ...]) -> bool:
        """Run what belongs together if all that it takes is there; nothing is given before all have run."""
        inbox = self.inbox[rank]
        for step in together:
            if step.takes is not None and step.takes not in inbox and not self._fetch(step.takes):
                return False
        results = []
        for action, takes, _, acknowledged in together:
            passed = 0
            if takes is not None:
                passed = inbox.pop(takes)
                if acknowledged:
                    assert self.received[rank, takes.source] >= acknowledged, f"{action}: not received so many yet"
            self._act(rank, action, passed)
            results.append(passed + 1)
        for step, result in zip(together, results, strict=True):
            if step.gives is not None:
                self._send(step.gives, result)
        return True

    def _fetch(self, wanted: Message) -> bool:
        """Whether the sender has it; it and those before it are then with the receiver."""
        pair = wanted.source, wanted.destination
        queue = self.outbox.get(pair)
        while queue and self._receive(pair, *queue.popleft()) != wanted:
            pass
        return wanted in self.inbox[wanted.destination]

    def _send(self, message: Message, passed: int) -> None:
        source, destination = pair = message[3:]
        if source == destination:
            self.inbox[source][message] = passed
        elif self.rendezvous[pair]:
            self.outbox[pair].append((message, passed))
        else:
            self._receive(pair, message, passed)

    def _receive(self, pair: tuple[int, int], message: Message, passed: int) -> Message:
        first = self.expected[pair].popleft()
        assert message == first, f"rank {pair[1]} expects {first} where rank {pair[0]} sends {message}"
        self.inbox[pair[1]][message] = passed
        self.received[pair] += 1
        return message

    def _act(self, rank: int, action: Action, passed: int) -> None:
        """The bookkeeping of one action that took what has been through ``passed`` stages."""
        kind, stage, _ = action
        if kind in PER_STEP:
            if kind is Kind.R:
                assert not any(key[0] == stage for held in (self.saved, self.pending) for key in held[rank])
                self.work.reduced.append(stage)
            return
        assert stage not in self.work.reduced, f"{action} comes after the reduction"
        key, saved, pending = action[1:], self.saved[rank], self.pending[rank]
        if kind is Kind.F:
            assert passed == stage % self.depth, f"{action} took what has been through {passed} stages"
            (self.inputs[rank] if key in self.recomputed else saved).add(key)
        elif kind is Kind.C:
            self.inputs[rank].remove(key)
            saved.add(key)
        elif kind is Kind.W:
            pending.remove(key)
        else:
            assert passed == self.depth - 1 - stage % self.depth, f"{action} took what came through {passed} stages"
            saved.remove(key)
            if kind is Kind.I:
                pending.add(key)
        if kind in (Kind.F, Kind.C):
            self.work.peaks[rank] = max(self.work.peaks[rank], len(saved) + len(pending))
        self.work.done[kind].append(key)
