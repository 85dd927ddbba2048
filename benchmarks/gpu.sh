#!/usr/bin/env bash
# GPU tests and benchmarks for a short stay on a rented machine: nine minutes, the most important first, each result written
# as soon as it exists; the same command continues with what is missing. See --help, and benchmarks/README.md.
#   bash benchmarks/gpu.sh [FOLDER [PART...]]     results in FOLDER (default: $OUT, or benchmarks/results/latest)
#   LLM2VEC=PATH, NEMO=PATH     a Python or a folder of packages for these peers (l2v bench train_step --llm2vec, --nemo)
set -euo pipefail
folder=$PWD
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
cd "$folder"
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
