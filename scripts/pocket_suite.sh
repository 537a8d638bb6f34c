#!/usr/bin/env bash
# Every method of Herd on the pocket suite by one command, then the tables, and a page to look at them.
#     bash scripts/pocket_suite.sh             # handwritten digits, Dirichlet 0.5, one seed of everything
#     FULL=1 bash scripts/pocket_suite.sh      # characters too, three seeds, all betas
# Finished runs are not run again, interrupted ones go on: stop it and start it when you like. JOBS=2, OUT=results/suite.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-results/suite}
PYTHON=${PYTHON:-.venv/bin/python}
if [ "${FULL:-0}" = 1 ]; then
  federated="" spiking="" arithmetic="" unlearning=""
else
  export SEEDS=${SEEDS:-0}
  federated="DATASETS=seq-digits BETAS=0.5" spiking="" arithmetic="EXACT=0" unlearning="BETAS=0.5 WHO=0"
fi
began=$(date +%s)
env $federated OUT="$OUT/federated" MORE="--measure_federated_bias 1" bash scripts/pocket_table.sh
env $spiking OUT="$OUT/spiking" bash scripts/pocket_spiking.sh
env $arithmetic OUT="$OUT/arithmetic" bash scripts/pocket_task_arithmetic.sh
env $unlearning OUT="$OUT/unlearning" bash scripts/pocket_unlearning.sh
"$PYTHON" -m utils.report "$OUT" -o "$OUT/report.html"
echo "$((($(date +%s) - began) / 60)) minutes"
