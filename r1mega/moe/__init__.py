"""Mixture of experts: ``router``, ``dispatcher`` (all-to-all), ``experts``, ``layer`` (all of it), ``balance``.

In another stack: :class:`r1mega.moe.layer.MoELayer` with a :class:`r1mega.parallel_state.ParallelState`, or
:class:`r1mega.moe.dispatcher.AllToAllDispatcher` with two process groups.
"""
