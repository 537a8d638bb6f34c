#!/usr/bin/env bash
# Methods x seeds in plain shell, JOBS at a time. Started again it goes on: finished runs answer at once, interrupted
# ones resume. For grids in a file, several GPUs, SLURM and a summary there is python -m utils.sweep.
#     bash scripts/sweep.sh       # METHODS="dolfin lorm" SEEDS="0 1" JOBS=1 OUT=results/x MORE="--num_clients 5"
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-results/sweep}
one() { # METHOD SEED: one run; if it fails the others go on
  $PYTHON main.py --model "$1" --seed "$2" --dataset seq-digits --fl --num_threads 1 ${MORE:-} \
    --loadcheck auto --savecheck task --results_path "$OUT" >/dev/null || echo "failed: $*" >&2
}
export -f one
for method in ${METHODS:-fedavg ffa_lora dolfin}; do
  for seed in ${SEEDS:-0 1 2}; do echo "$method $seed"; done
done | xargs -P "${JOBS:-2}" -n 2 bash -c 'one "$@"' _
$PYTHON -m utils.compare "$OUT"
