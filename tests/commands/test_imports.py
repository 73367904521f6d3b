"""What a command imports: a mistake waits for no library that it does not need, and an answer for few."""

import subprocess
import sys

import pytest

from toys import ROOT

HEAVY = {"torch", "transformers", "datasets", "evaluate", "matplotlib", "pandas", "pyarrow", "accelerate", "gradio"}
# command line -> heavy libraries that it may import
LINES = {
    "recipes": set(),
    "--version": set(),
    "train --help": set(),
    "train smoke --fp16": set(),
    "train smoke --optim.lrr 3": set(),
    "train frozen/smollm2": set(),
    "train zzz": set(),
    "plan zzz": set(),
    "plan smoke --count 0": set(),
    "eval smoke": set(),
    "eval {runs}/text --masked 3": set(),
    "table {runs}/hops --against x": set(),
    "ask {runs}/none": set(),
    "ask {runs}/hops --loops 0": set(),
    "ask {runs}/hops e1_r99": set(),
    "ask {runs}/hops where_is_e1": set(),
    "ask {runs}/text ''": set(),
    "ask {runs}/text the_page": {"torch", "transformers", "accelerate"},
    "ask {runs}/hops e1_r1_r0": HEAVY - {"evaluate", "matplotlib", "gradio"},  # its facts are in its data
}
PROGRAM = """
import sys
from looplab.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
print("imported:", *sorted(set(sys.modules) & {heavy}))
sys.exit(status)
"""


@pytest.mark.parametrize("line", [pytest.param(line, marks=[pytest.mark.slow] * bool(LINES[line])) for line in LINES])
def test_a_command_imports_what_it_needs(line, toy_runs):
    words = ["" if word == "''" else word.replace("_", " ") for word in line.format(runs="RUNS").split()]
    words = [word.replace("RUNS", str(toy_runs)) for word in words]
    program = PROGRAM.format(heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True)
    good = line in ("recipes", "--version", "train --help") or LINES[line]
    assert done.returncode == (0 if good else 2), done.stderr
    imported = set(done.stdout.splitlines()[-1].split()[1:])
    assert imported <= LINES[line], done.stderr
