#!/usr/bin/env bash
# GPU tests, then the quick benchmarks, in under nine minutes; results in the folder given or in $OUT.
#   bash benchmarks/gpu.sh [FOLDER]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-benchmarks/results/latest}}
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
status=0

step() {
    local name=$1 limit=$2
    shift 2
    local start=$SECONDS
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    local code=$?
    [ $code -eq 0 ] || status=1
    echo "== $name: exit code $code, $((SECONDS - start)) s"
    tail -n 25 "$out/$name.log"
}

nvidia-smi >"$out/device.txt" 2>&1
# Most of the tests' time is compilation, so several processes, where pytest-xdist is there.
workers=()
"$python" -c "import xdist" 2>/dev/null && workers=(-n 8)
# Tests first and benchmarks only if they pass: a fast wrong kernel is not worth a number.
step tests 280 "$python" -m pytest -q -x -p no:cacheprovider tests/kernels/test_attention_gpu.py --durations=10 "${workers[@]}"
if command -v compute-sanitizer >/dev/null; then
    step sanitizer 60 compute-sanitizer --error-exitcode 9 "$python" -m pytest -q -p no:cacheprovider \
        tests/kernels/test_attention_gpu.py -k "bit_for_bit or nan_and_no_fault"
fi
if [ $status -eq 0 ]; then
    step attention 180 "$python" -m benchmarks.attention --quick --out "$out"
else
    echo "== benchmarks: not run, the tests are red"
fi
exit $status
