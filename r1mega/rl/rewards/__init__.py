"""Rewards that rules compute: a function of prompt, completion and reference each, computed in killable children.

``RewardPool(RewardOptions(names=["accuracy", "format"]), num_workers=4).submit(Sample(...)).result()`` gives
:class:`Scores`. The names are in :data:`BUILT_IN`; a reward of your own is named ``package.module:function``.
"""

from r1mega.rl.rewards.definition import BUILT_IN, RewardFailure, reward
from r1mega.rl.rewards.options import RewardOptions
from r1mega.rl.rewards.pool import RewardPool, check_rewards
from r1mega.rl.rewards.sample import Sample, Scores

__all__ = [
    "BUILT_IN",
    "RewardFailure",
    "RewardOptions",
    "RewardPool",
    "Sample",
    "Scores",
    "check_rewards",
    "reward",
]
