#!/bin/sh
# What a looped model does on one GPU, in at most ten minutes: one table, and the rows in runs/gpu/gpu.jsonl.
#   benchmarks/gpu.sh            on the GPU that torch finds
#   benchmarks/gpu.sh --tiny     tiny sizes on a CPU, to see that it works; the numbers mean nothing
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-.venv/bin/python}
[ -x "$PYTHON" ] || PYTHON=python3
exec "$PYTHON" -m looplab.bench.gpu "$@"
