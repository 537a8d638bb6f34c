#!/usr/bin/env bash
# What LoRM and LIVAR are made of, one choice changed at a time, three seeds each. LIVAR is about one task: --joint 1.
#     bash scripts/pocket_ablations.sh          # SEEDS="0 1 2" DATASETS="seq-digits seq-glyphs" BETA=0.5 JOBS=2
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/pocket_methods.sh
OUT=${OUT:-results/ablations}
BETA=${BETA:-0.5}
LORM=(
  ""
  "--train_matrix B"
  "--train_matrix A"
  "--alpha_regmean_backbone 0.5"
  "--alpha_regmean_backbone 1"
  "--alpha_regmean_head 0"
  "--alpha_regmean_head 1"
  "--lorm_gram_model local"
  "--lorm_task_merge mean"
  "--regmean_all 0"
)
LIVAR=(
  ""
  "--livar_head count"
  "--livar_head uniform"
  "--livar_head var_count"
  "--livar_head inv_var"
  "--livar_rule uniform"
  "--livar_rule count"
  "--livar_eval omega_product"
  "--livar_broadcast product_svd"
  "--livar_mode principled"
)
jobs=$(mktemp)
for seed in ${SEEDS:-0 1 2}; do
  for dataset in ${DATASETS:-seq-digits seq-glyphs}; do
    split=$(split_flags "$dataset" "$BETA")
    for flags in "${LORM[@]}"; do
      echo "$PYTHON main.py --model lorm --fl $flags $split --seed $seed $COMMON --results_path $OUT"
    done
    for flags in "${LIVAR[@]}"; do
      echo "$PYTHON main.py --model livar --joint 1 --fl $flags $split --seed $seed $COMMON --results_path $OUT"
    done
  done
done >"$jobs"
run_all "$jobs"
$PYTHON -m utils.compare "$OUT" --metric faa,forgetting,uplink_mb,train_cpu_seconds --sort faa --format "${FORMAT:-table}"
