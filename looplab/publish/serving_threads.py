"""The jobs of a looped frozen model: each is a thread, and one thread computes at a time.

The layers of its window keep the state of the loop, so that another thread may compute only between two tokens.
"""

import threading
from collections import deque
from typing import Any

import torch
from transformers import LogitsProcessor

from modeling_looped import FrozenLoopedForCausalLM

from .serving_requests import LeavesOne, Refusal


class AtWork(threading.local):
    """The job that the present thread works at."""

    job: Any = None


at_work = AtWork()


class Turns:
    """Lets one thread compute at a time.

    A thread that passes its turn on goes to the end of the queue, so that every waiting thread has exactly one turn
    between two turns of another.
    """

    def __init__(self):
        self.lock, self.waiting, self.taken = threading.Lock(), deque(), False

    def take(self) -> None:
        """Wait for a first turn."""
        with self.lock:
            if not self.taken:
                self.taken = True
                return
            mine = self._queue_up()
        mine.acquire()

    def give(self) -> None:
        """End the last turn of this thread."""
        with self.lock:
            if self.waiting:
                self.waiting.popleft().release()
            else:
                self.taken = False

    def pass_on(self) -> None:
        """Let the waiting threads compute first, if there are any."""
        with self.lock:
            if not self.waiting:
                return
            mine = self._queue_up()
            self.waiting.popleft().release()
        mine.acquire()

    def _queue_up(self) -> threading.Lock:
        mine = threading.Lock()
        mine.acquire()
        self.waiting.append(mine)
        return mine


class Draws(LogitsProcessor):
    """Gives a request the random numbers that follow `torch.manual_seed(seed)`.

    `generate` draws from torch's global generator, and so do other requests in between: this processor sets the state
    of the generator before each draw, and `keep` notes it after.
    """

    def __init__(self, seed: int, device: torch.device):
        self.generator = torch if device.type == "cpu" else torch.get_device_module(device)
        self.state = torch.Generator(device).manual_seed(seed).get_state()

    def __call__(self, input_ids, scores):
        self.generator.set_rng_state(self.state)
        return scores

    def keep(self) -> None:
        """Note the state of the generator after a draw."""
        self.state = self.generator.get_rng_state()


class Threads:
    """A worker of jobs, see `serving_jobs.py`."""

    def __init__(self, model: FrozenLoopedForCausalLM):
        self.model, self.turns = model, Turns()
        for window in model.loop.windows[:1]:
            window.layers[-1].module.register_forward_hook(after_loop)

    def room(self, num_tokens: int) -> int:
        return num_tokens

    def start(self, job) -> None:
        threading.Thread(target=self.run, args=(job,), daemon=True).start()

    def run(self, job) -> None:
        """The work of the thread of a job."""
        at_work.job = job
        self.turns.take()
        try:
            error = self.generate(job)
        finally:
            self.turns.give()
        job.end(error)

    def generate(self, job) -> Exception | None:
        """Generate the reply; returns what ends it early."""
        plan = job.plan
        draws = Draws(plan.seed, plan.input_ids.device)

        def after_token(input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
            draws.keep()
            stops = job.after_token(int(input_ids[0, -1]))
            self.turns.pass_on()
            job.check()
            return torch.tensor([stops], device=input_ids.device)

        try:
            job.check()
            self.model.generate(
                plan.input_ids,
                attention_mask=torch.ones_like(plan.input_ids),
                generation_config=plan.config,
                logits_processor=[LeavesOne(), draws],
                stopping_criteria=[after_token],
                **plan.depth,
            )
        except Refusal as refusal:
            return refusal.with_traceback(None)  # the traceback would keep the cache in memory
        except Exception as error:
            return error
        return None


def after_loop(*_) -> None:
    if at_work.job:
        at_work.job.loops += 1
        at_work.job.check()
