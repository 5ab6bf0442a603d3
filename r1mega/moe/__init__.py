"""Mixture of experts: ``router``, ``dispatcher``, ``experts``, ``layer`` (all of it), ``balance``, ``placement``.

The dispatcher's parts: ``exchanges`` (tokens to experts and back), ``collectives`` (the messages), ``wire`` (what a row
of a message holds), ``overlap`` (start now, wait later).

In another stack: :class:`r1mega.moe.layer.MoELayer` with a :class:`r1mega.parallel_state.ParallelState`, or
:class:`r1mega.moe.dispatcher.AllToAllDispatcher` with a process group.
"""
