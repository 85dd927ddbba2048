#!/usr/bin/env bash
# From a CSV of questions and answers to a search. Run it in a checkout or anywhere else; the run is written to ./runs/faq.
#   bash examples/own_data/train_on_csv.sh [KEY=VALUE ...]      keys of the recipe, such as stages.supervised.steps=10
# BASE: the decoder to train. A few minutes on two cores.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ -f faq.yaml ] || l2v init faq --data "$here/faq.csv" --base "${BASE:-smollm2-135m-instruct}"
l2v train faq.yaml "$@"
l2v search runs/faq "min baghjul er skævt, hvad gør jeg" --texts "$here/faq.csv"
