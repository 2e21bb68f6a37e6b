#!/bin/sh
# Answers every open question about the GPU in at most 8 minutes: benchmarks/cuda/run.sh OUT [OPTIONS]
# PYTHON: the interpreter that has PyTorch; without it python3.
set -e
root=$(cd "$(dirname "$0")/../.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m benchmarks.cuda "$@"
