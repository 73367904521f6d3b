"""Processes that tests start, without the five seconds in which a new Python imports torch and transformers.

A server has imported them once, and forks; it is started with the first of them, in each process of pytest-xdist.
"""

import multiprocessing
import os
import runpy
import sys
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from unittest import mock

from toys import ROOT

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["forked_imports"])


class Fork:
    """A Python script in a process of its own, as `python SCRIPT ARGUMENTS` at the top of the repository runs it.

    Args:
        script: path.
        arguments: of the script.
        log: the file that gets what it prints.
        environment: variables beside those of this process.
    """

    def __init__(self, script: str | Path, *arguments: str, log: Path, **environment: str):
        self.log = log
        variables = {**os.environ, **environment}
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # Python 3.11 tells it no other way
            ensure_running()
        self.process = SERVER.Process(target=run_script, args=(str(script), arguments, str(log), variables))
        self.process.start()

    def printed(self) -> str:
        """What it has printed so far, errors among it."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def status(self, timeout: float = 300) -> int:
        """The exit status, once it has ended."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"the process did not end in {timeout} s: {self.printed()[-3000:]}")
        return self.process.exitcode


def run_script(script: str, arguments: tuple[str, ...], log: str, variables: dict[str, str]) -> None:
    """What a fork does. Libraries read the environment when they were imported, but for what is set here."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import datasets

    if "HF_DATASETS_CACHE" in variables:
        datasets.config.HF_DATASETS_CACHE = Path(variables["HF_DATASETS_CACHE"])
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
