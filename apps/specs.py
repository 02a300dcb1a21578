"""Rewards as the command line names them."""

import re
import sys
from pathlib import Path

from steer.reward import Reward, load_reward, reward_names, with_timeout
from steer.rewards.remote_protocol import ADDRESS


def reward_here(text: str, timeout: float | None = None) -> Reward:
    """The reward of a text; my_file:function is found in the current folder too.

    timeout  seconds that each call may take; None: any
    """
    # For rewards that have a name, or an address, the folder stays out of reach.
    if set(re.findall(r"([A-Za-z_][\w.]*):", re.sub(ADDRESS, "", text))) - set(reward_names()):
        sys.path.append(str(Path.cwd()))
    return with_timeout(load_reward(text), timeout)
