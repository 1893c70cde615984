#!/usr/bin/env bash
# Measure on a GPU in parts: benchmarks/gpu.sh PART [--tiny] [--out FOLDER]. See benchmarks/gpu.py.
# PYTHON chooses the interpreter: the one that has torch and transformers.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root/src:$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
