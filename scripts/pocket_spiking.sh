#!/usr/bin/env bash
# STAER on the pocket suite: its baselines, its controls and its twins with ReLUs, five seeds, 4 time steps.
#     bash scripts/pocket_spiking.sh          # SEEDS="0 1 2 3 4" DATASET=seq-digits BUFFER=100 JOBS=2
# Runs that are finished are not run again.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/pocket_methods.sh
OUT=${OUT:-results/spiking}
BUFFER=${BUFFER:-100}
ANN="--backbone resnet-pocket --optimizer adamw --lr 0.003 --lr_scheduler cosine --n_epochs 3 --batch_size 10"
ROWS=(
  "--model spiking-sgd"
  "--model ser --buffer_size $BUFFER"
  "--model ser --buffer_size $((2 * BUFFER))"
  "--model sderpp --buffer_size $BUFFER"
  "--model staer --buffer_size $BUFFER"
  "--model staer --buffer_size $BUFFER --beta 0"
  "--model staer --buffer_size $BUFFER --beta 0.001"
  "--model staer --buffer_size $BUFFER --beta 0.01"
  "--model staer --buffer_size $BUFFER --beta 0.1"
  "--model staer --buffer_size $BUFFER --beta 1"
  "--model staer --buffer_size $BUFFER --bn_update main_only"
  "--model staer --buffer_size $BUFFER --staer_buffers shared"
  "--model staer --buffer_size $BUFFER --staer_resample interp"
  "--model er --buffer_size $BUFFER $ANN"
  "--model derpp --buffer_size $BUFFER $ANN"
  "--model joint ${ANN/resnet-pocket/sresnet-pocket}"
  "--model joint $ANN"
)
jobs=$(mktemp)
for seed in ${SEEDS:-0 1 2 3 4}; do
  for row in "${ROWS[@]}"; do
    echo "$PYTHON main.py $row --dataset ${DATASET:-seq-digits} --seed $seed $COMMON --measure_spikes 1 --results_path $OUT"
  done
done >"$jobs"
run_all "$jobs"
$PYTHON -m utils.compare "$OUT" --sort faa --format "${FORMAT:-table}" \
  --metric faa,forgetting,faa_task_il,firing_rate,energy_mj,faa_T1,faa_T8,train_cpu_seconds
