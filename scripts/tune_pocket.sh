#!/usr/bin/env bash
# Choose learning rates of the pocket table on a validation split (20 % of the training images), one seed.
#     bash scripts/tune_pocket.sh [seq-glyphs|seq-digits] [tasks]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/pocket_methods.sh
DATASET=${1:-seq-glyphs}
TASKS=${2:-3}
OUT=results/tune
jobs=$(mktemp)
for row in "${METHODS[@]}"; do
  IFS='|' read -r _ flags rates <<<"$row"
  for lr in $rates; do
    echo "$PYTHON main.py $flags --dataset $DATASET $COMMON --optimizer adam --lr $lr --validation 20" \
      "--stop_after $TASKS --results_path $OUT"
  done
done >"$jobs"
run_all "$jobs"
$PYTHON -m utils.compare "$OUT/$DATASET" --all --metric faa,faa_task_il,train_seconds
