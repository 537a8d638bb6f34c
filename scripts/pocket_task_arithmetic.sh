#!/usr/bin/env bash
# Task arithmetic on the pocket suite: TAK and its baselines, and mergers of the same experts, three seeds.
#     bash scripts/pocket_task_arithmetic.sh     # SEEDS="0 1 2" DATASET=seq-scripts JOBS=2; EXACT=0: no exact factors
# Runs that are finished are not run again.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/pocket_methods.sh
OUT=${OUT:-results/task_arithmetic}
DATASET=${DATASET:-seq-scripts}
MORE="--localisation --disentanglement 0 1 --control_dataset seq-digits"
REST="--control_dataset seq-digits"
ROWS=(
  "--model task_arithmetic $MORE"
  "--model tak $MORE"
  "--model tak --tak_refs past $MORE"
  "--model tak --fisher_ideal 1 --reg_lambda 3500 $MORE"
  "--model tak --curvature diag $MORE"
  "--model tau_jp $MORE"
  "--model tak --control_refs 1 $REST"
  "--model tak --control_refs 1 --tak_refs none $REST"
  "--model task_arithmetic --regime attention $REST"
  "--model tak --regime attention $REST"
)
[ "${EXACT:-1}" = 0 ] || ROWS+=("--model tak --kfac_draws 0 $MORE") # fifteen times the seconds
MERGERS=(
  "--model task_arithmetic --regime full"
  "--model task_arithmetic --regime full --merging mean"
  "--model task_arithmetic --regime full --merging ties"
  "--model task_arithmetic --regime full --merging dare"
  "--model task_arithmetic --regime full --merging iso_c"
  "--model task_arithmetic --regime full --merging iso_cts"
  "--model task_arithmetic --regime full --merging tsv_m"
  "--model task_arithmetic --regime full --merging wudi"
  "--model fisher_merging"
  "--model com --model_config regmean"
  "--model com --model_config regmean++"
  "--model com"
  "--model com --com_alpha 0.95"
  "--model com --com_task_weight offdiag"
  "--model com --com_task_weight inv_offdiag"
  "--model com --com_target expert_output"
)
jobs=$(mktemp)
for seed in ${SEEDS:-0 1 2}; do
  for row in "${ROWS[@]}" "--model task_arithmetic --regime full --save_task_vectors 1 $REST"; do
    echo "$PYTHON main.py $row --dataset $DATASET --seed $seed $COMMON --results_path $OUT"
  done
done >"$jobs"
run_all "$jobs"
for seed in ${SEEDS:-0 1 2}; do  # the mergers get the experts of the last row
  experts=$(ls -t "$OUT/$DATASET"/task_arithmetic/*-s"$seed"-*/task_vectors.safetensors | head -1)
  for row in "${MERGERS[@]}"; do
    echo "$PYTHON main.py $row --merge_from $experts --layer_errors --dataset $DATASET --seed $seed $COMMON --results_path $OUT/mergers"
  done
done >"$jobs"
run_all "$jobs"
$PYTHON -m utils.compare "$OUT" --sort absolute_acc --format "${FORMAT:-table}" --metric \
  absolute_acc,normalized_acc,absolute_acc_best,best_alpha,negation_target,negation_control,localisation_auroc,layer_error,train_cpu_seconds
