"""The jobs of a looped model: one thread runs one loop of all of them per step, each at its own depth."""

import threading
from typing import Any

import torch

from modeling_looped import LoopedForCausalLM
from modeling_looped.depth_batching_looped import Request
from modeling_looped.pages_looped import page_capacity

from .serving_requests import LeavesOne, Refusal


class Batch:
    """A worker of jobs, see `serving_jobs.py`. Its thread lives while there are jobs.

    Args:
        max_rows: most requests that loop together.

    Raises:
        ValueError: requests of this model cannot be run together.
    """

    def __init__(self, model: LoopedForCausalLM, max_rows: int):
        self.batch, self.device = model.depth_batching(max_rows), model.device
        self.lock, self.coming, self.runs = threading.Lock(), [], False

    def room(self, num_tokens: int) -> int:
        return page_capacity(num_tokens)

    def start(self, job) -> None:
        with self.lock:
            if not self.runs:
                threading.Thread(target=self.run, daemon=True).start()
            self.runs = True
            self.coming.append(job)

    def run(self) -> None:
        """The work of the thread."""
        jobs: dict[Request, Any] = {}
        while True:
            with self.lock:
                coming, self.coming = self.coming, []
                self.runs = bool(coming or jobs or self.batch.is_busy)
                if not self.runs:
                    return
            for job in coming:
                self.add(job, jobs)
            for request, job in tuple(jobs.items()):
                try:
                    job.check()
                except Refusal as refusal:
                    request.cancel()
                    jobs.pop(request).end(refusal.with_traceback(None))
            self.step(jobs)

    def add(self, job, jobs: dict) -> None:
        """Make a request of a job."""
        plan = job.plan
        try:
            request = self.batch.add(
                plan.input_ids,
                plan.config,
                logits_processor=[LeavesOne()],
                generator=torch.Generator(self.device).manual_seed(plan.seed),
                on_token=job.after_token,
                **plan.depth,
            )
        except Exception as error:
            job.end(error)
        else:
            jobs[request] = job

    def step(self, jobs: dict) -> None:
        """One loop of every request; the jobs of those that have ended end."""
        try:
            ended = [request for request, token in self.batch.step() if token is None]
        except Exception:  # every request at work has ended with it
            ended = [request for request in jobs if request.ended]
        for request, job in jobs.items():
            job.loops = request.loops
        for request in ended:
            if request in jobs:
                jobs.pop(request).end(request.error)
