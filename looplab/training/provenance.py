"""Where a run was made: commit, machine, versions."""

import importlib.metadata
import os
import shutil
import subprocess
from pathlib import Path

import torch
from accelerate import Accelerator

from looplab.instruments.timing import processor


def commit() -> str | None:
    """The commit checked out here. An installed wheel has none, though its environment may lie in a repository."""
    here = Path(__file__)
    if shutil.which("git") is None:
        return None
    for command in (["ls-files", "--error-unmatch", here.name], ["rev-parse", "HEAD"]):
        done = subprocess.run(["git", "-C", str(here.parent), *command], capture_output=True, encoding="utf-8")
        if done.returncode:
            return None
    return done.stdout.strip()


def provenance(accelerator: Accelerator) -> dict:
    """Where a run was made: commit of the repository that has this file (None without one), machine, versions."""
    return {
        "commit": commit(),
        "hardware": {
            "cpu": processor(),
            "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type,
            "processes": accelerator.num_processes,
        },
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "accelerate", "datasets")},
    }
