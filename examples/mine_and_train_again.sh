#!/usr/bin/env bash
# Hard negatives from a trained encoder, and a second training on them. Start own_data/train_on_csv.sh first, in the same folder.
#   bash examples/mine_and_train_again.sh [KEY=VALUE ...]       keys of the recipe, such as stages.supervised.steps=10
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Right answers that nobody labelled would be bad negatives, so a candidate stays below 95% of its positive's score.
[ -f mined.jsonl ] || l2v data mine runs/faq "$here/own_data/faq.csv" --out mined.jsonl --number 2 --relative 0.95
# Same recipe, same start (the stage mntp), but every question now also meets two wrong answers that look right.
l2v train faq.yaml --stage supervised out=runs/faq-mined "adapters=[runs/faq/mntp/adapter]" data=mined.jsonl "$@"
l2v search runs/faq-mined "min baghjul er skævt, hvad gør jeg" --texts "$here/own_data/faq.csv"
