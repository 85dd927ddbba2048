#!/usr/bin/env bash
# GPU tests, then the quick benchmarks, in under nine minutes; results in the folder given or in $OUT.
#   bash benchmarks/gpu.sh [FOLDER [PART...]]     parts: info_nce attention gradient_cache, all of them by default; and those
#                                                 of the fused layer: step_ops lora_linear linear_cross_entropy fp8
# Two more parts take the nine minutes for themselves; called again with the same FOLDER, train_step resumes where it stopped:
#   LLM2VEC=PATH bash benchmarks/gpu.sh FOLDER train_step      the full step of Llama-3-8B; PATH: see its --llm2vec
#   bash benchmarks/gpu.sh FOLDER encode
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-benchmarks/results/latest}}
shift $(($# > 0))
parts=" ${*:-info_nce attention gradient_cache} "
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
status=0
end=530

# step NAME LIMIT COMMAND...: its output goes to a file, its end to the screen; no step outlives the nine minutes.
step() {
    local name=$1 limit=$2
    shift 2
    local start=$SECONDS left=$((end - SECONDS))
    if [ $left -lt 15 ]; then
        echo "== $name: not run, no time is left"
        status=1
        return 1
    fi
    timeout $((limit < left ? limit : left)) "$@" >"$out/$name.log" 2>&1
    local code=$?
    [ $code -eq 0 ] || status=1
    echo "== $name: exit code $code, $((SECONDS - start)) s"
    tail -n 25 "$out/$name.log"
    return $code
}

wanted() { [[ $parts == *" $1 "* ]]; }

# tests NAME LIMIT: the GPU tests of one op.
tests() { step "tests-$1" "$2" "$python" -m pytest -q -x -p no:cacheprovider "tests/kernels/test_$1_gpu.py" --durations=10 "${workers[@]}"; }

nvidia-smi >"$out/device.txt" 2>&1
# Most of the tests' time is compilation, so several processes, where pytest-xdist is installed.
workers=()
"$python" -c "import xdist" 2>/dev/null && workers=(-n 8)
# Tests first, and of each op the benchmark only if they pass: a fast wrong kernel is not worth a number.
for op in step_ops lora_linear linear_cross_entropy fp8 info_nce attention; do
    wanted $op && tests $op 200 && passed="${passed:-} $op "
done
if wanted attention && command -v compute-sanitizer >/dev/null; then
    step sanitizer 60 compute-sanitizer --error-exitcode 9 "$python" -m pytest -q -p no:cacheprovider \
        tests/kernels/test_attention_gpu.py -k "bit_for_bit or nan_and_no_fault" || passed=${passed/ attention /}
fi
for op in lora_linear step_ops linear_cross_entropy fp8 attention info_nce; do
    wanted $op || continue
    case $op in
        info_nce) benchmark=contrastive module=kernels.contrastive ;;
        lora_linear) benchmark=fused_layer module=kernels.fused_layer ;;
        fp8) benchmark=fp8 module=fp8.kernels ;;
        *) benchmark=$op module=kernels.$op ;;
    esac
    if [[ ${passed:-} == *" $op "* ]]; then
        step $benchmark 120 "$python" -m "benchmarks.$module" --quick --out "$out"
    else
        echo "== $benchmark: not run, the tests are red"
    fi
done
if wanted gradient_cache; then
    step gradient_cache 120 "$python" -m benchmarks.gradient_cache.bench --quick --out "$out"
fi
# 16 GB of random weights stay where the next call finds them.
work=${WORK:-${TMPDIR:-/tmp}/l2v-benchmarks}
if wanted train_step; then
    step train_step 525 "$python" -m benchmarks.train_step.bench --minutes 8.5 --out "$out" --work "$work" \
        ${LLM2VEC:+--llm2vec "$LLM2VEC"}
fi
if wanted encode; then
    step encode 300 "$python" -m benchmarks.encode --out "$out" --work "$work"
fi
exit $status
