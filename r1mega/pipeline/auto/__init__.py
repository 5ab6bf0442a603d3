"""``auto``: schedules found by search, for measured costs and a memory limit.

``search`` puts the parts together: ``problem`` (what is to be solved, and how solutions are timed), ``zb_greedy`` and
``list_scheduling`` (first tables), ``improve`` (local improvement), ``exact`` (OR-tools), ``bounds`` (how good a table
can be at all).
"""

from r1mega.pipeline.auto.problem import Objective, peak_memory
from r1mega.pipeline.auto.search import AutoResult, best_table
from r1mega.pipeline.auto.zb_greedy import zb_greedy

__all__ = ["AutoResult", "Objective", "best_table", "peak_memory", "zb_greedy"]
