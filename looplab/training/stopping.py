"""A run that its scheduler ends: SIGTERM and SIGUSR1 ask for a checkpoint, and the process ends with REQUEUE.

Slurm sends SIGTERM before it takes a job away, and the signal of `--signal` some time before the job's limit. The
second signal of a kind does what it always does.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# EX_TEMPFAIL of sysexits.h: not done, and worth another try. A mistake ends with 2, a bug with 1, a kill above 128.
REQUEUE = 75


@contextmanager
def listening() -> Iterator[threading.Event]:
    """Within the block, the first of SIGNALS only sets the event that the block gets."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # Python lets no other thread listen
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def ask(number: int, frame) -> None:
        asked.set()
        signal.signal(number, before[number])

    for number in SIGNALS:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number in SIGNALS:
            signal.signal(number, before[number])
