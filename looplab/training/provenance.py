"""Where a run was made: commit, machine, versions."""

import importlib.metadata
import os
import shutil
import subprocess
from pathlib import Path

import torch
from accelerate import Accelerator

from looplab.instruments.timing import processor


def provenance(accelerator: Accelerator) -> dict:
    """Where a run was made: commit of this file's repository (None outside of one), machine, versions."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    git = shutil.which("git")
    commit = subprocess.run(command, capture_output=True, encoding="utf-8").stdout.strip() if git else ""
    return {
        "commit": commit or None,
        "hardware": {
            "cpu": processor(),
            "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type,
            "processes": accelerator.num_processes,
        },
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "accelerate", "datasets")},
    }
