#!/usr/bin/env bash
# The tables of docs/pocket.md on federated learning: every method, three seeds, both data sets, Dirichlet 0.5 and 0.1.
# Runs that are finished are not run again; interrupted ones go on from their last task.
#     bash scripts/pocket_table.sh    # SEEDS="0 1 2" DATASETS="seq-glyphs seq-digits" BETAS="0.5 0.1" ROWS="lorm dolfin" JOBS=2
# MORE="--measure_federated_bias 1" adds flags to every run.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/pocket_methods.sh
OUT=${OUT:-results/pocket}
BETAS=${BETAS:-0.5 0.1}
jobs=$(mktemp)
for beta in $BETAS; do
  for seed in ${SEEDS:-0 1 2}; do
    for dataset in ${DATASETS:-seq-digits seq-glyphs}; do
      for row in "${METHODS[@]}"; do
        IFS='|' read -r name flags _ <<<"$row"
        split=$(split_flags "$dataset" "$beta")
        case $name in joint*) split="--dataset $dataset" ;; esac
        echo "$PYTHON main.py $flags $split --seed $seed $COMMON ${MORE:-} --savecheck task --results_path $OUT/beta$beta"
      done
    done
  done
done >"$jobs"
run_all "$jobs"
for beta in $BETAS; do
  echo "Dirichlet $beta"
  $PYTHON -m utils.compare "$OUT/beta$beta" --sort faa --format "${FORMAT:-table}" \
    --metric faa,avg_inc_acc,forgetting,faa_task_il,uplink_mb,downlink_mb,train_cpu_seconds
  $PYTHON -m utils.compare "$OUT/beta$beta" --plot "$OUT/beta$beta.png" >/dev/null
done
