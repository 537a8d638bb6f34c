#!/usr/bin/env bash
# Forgetting clients on the pocket suite: SATA, its rules for lambda and its twin without the tangent, and what it is
# compared to, over FedAvg of the whole network; ten clients, three of which ask, each judged against retraining.
#     bash scripts/pocket_unlearning.sh   # SEEDS="0 1 2" BETAS="0.1 0.5 1.0" WHO="0 3 7" DATASET=seq-digits JOINT=1 JOBS=2
# JOINT=0 for tasks in sequence. MORE="--n_epochs 1" adds flags; on a GPU: DEVICE=cuda MORE="--engine batched".
# Runs and rows that are there are not made again.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/pocket_methods.sh
OUT=${OUT:-results/unlearning}
DATASET=${DATASET:-seq-digits}
JOINT=${JOINT:-1}
ASK="--unlearn_client ${WHO:-0 3 7} --eval_retrain --relearn_rounds 10"
jobs=$(mktemp)
trap 'rm -f "$jobs"' EXIT
for seed in ${SEEDS:-0 1 2}; do
  for beta in ${BETAS:-0.1 0.5 1.0}; do
    split="--fl --dataset $DATASET --distribution_alpha $beta --num_clients 10 --joint $JOINT --seed $seed"
    split="$split $COMMON ${MORE:-} --results_path $OUT"
    for regime in linear full; do # one line for each model that is trained: its rows are made one after another
      line=""
      for rule in "--preset paper" "--preset exact1" "--sata_lambda proj" "--sata_lambda val" \
        "--preset paper --recover_rounds 1"; do
        line+="$PYTHON main.py --model sata --iso_schedule on_request --regime $regime $rule $split $ASK && "
      done
      echo "$line true"
    done
    line=""
    for way in retrain noop finetune history pga "pga --recover_rounds 1" federaser sifu not "not --recover_rounds 1" \
      fedquit "fedquit --recover_rounds 1" fused; do
      line+="$PYTHON main.py --model fedavg --unlearn_history 1 $split $ASK --unlearn $way && "
    done
    echo "$line true"
  done
done >"$jobs"
run_all "$jobs"
$PYTHON scripts/unlearning_table.py --record "$OUT" collect "$OUT"
$PYTHON scripts/unlearning_table.py --record "$OUT" page
