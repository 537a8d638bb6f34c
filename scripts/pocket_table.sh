#!/usr/bin/env bash
# The pocket table of the README: every method, three seeds, both data sets, ten clients, Dirichlet 0.5.
# Runs that are finished are not run again; interrupted ones go on from their last task.
#     bash scripts/pocket_table.sh            # SEEDS="0 1 2" DATASETS="seq-glyphs seq-digits" JOBS=2
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/pocket_methods.sh
OUT=${OUT:-results/pocket}
jobs=$(mktemp)
for seed in ${SEEDS:-0 1 2}; do
  for dataset in ${DATASETS:-seq-digits seq-glyphs}; do
    for row in "${METHODS[@]}"; do
      IFS='|' read -r _ flags _ <<<"$row"
      echo "$PYTHON main.py $flags --dataset $dataset --seed $seed $COMMON --savecheck task --results_path $OUT"
    done
  done
done >"$jobs"
run_all "$jobs"
$PYTHON -m utils.compare "$OUT" --metric faa,avg_inc_acc,forgetting,faa_task_il,uplink_mb,downlink_mb,train_seconds \
  --sort faa --format "${FORMAT:-table}"
$PYTHON -m utils.compare "$OUT" --plot "$OUT/pocket.png" >/dev/null
