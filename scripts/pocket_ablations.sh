#!/usr/bin/env bash
# What LoRM, LIVAR and HGP are made of, one choice changed at a time, three seeds each. LIVAR is about one task: --joint 1.
#     bash scripts/pocket_ablations.sh    # OF="lorm livar hgp" SEEDS="0 1 2" DATASETS="seq-digits seq-glyphs" BETA=0.5 JOBS=2
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
HGP=(
  ""
  "--rebalance_scope none"
  "--rebalance_scope old"
  "--rebalance_scope cur"
  "--proto_var_scale 1"
  "--proto_var_scale 9"
  "--proto_cov full"
  "--proto_pool gaussian"
  "--tau 0"
  "--prompt_init zeros"
  "--prompt_len 200"
  "--prompt_len 200 --prompt_init zeros"
  "--prompt_mode pool"
  "--model_config hgp-v1"
)
jobs=$(mktemp)
for seed in ${SEEDS:-0 1 2}; do
  for dataset in ${DATASETS:-seq-digits seq-glyphs}; do
    split=$(split_flags "$dataset" "$BETA")
    for model in ${OF:-lorm livar hgp}; do
      case $model in
        lorm) variants=("${LORM[@]}") common="" ;;
        livar) variants=("${LIVAR[@]}") common="--joint 1" ;;
        hgp) variants=("${HGP[@]}") common="--measure_bias_source 1" ;;
      esac
      for flags in "${variants[@]}"; do
        echo "$PYTHON main.py --model $model --fl $common $flags $split --seed $seed $COMMON --results_path $OUT"
      done
    done
  done
done >"$jobs"
run_all "$jobs"
$PYTHON -m utils.compare "$OUT" --metric faa,forgetting,incremental_bias,uplink_mb,train_cpu_seconds --sort faa --format "${FORMAT:-table}"
