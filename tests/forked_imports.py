"""What the server of `forks.py` imports before it forks."""

import peft  # noqa: F401

import looplab.train  # noqa: F401
