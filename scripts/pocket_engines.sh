#!/usr/bin/env bash
# The rows of the pocket table that the batched engine can stack, on both engines: same numbers, other seconds.
# A row runs serially, then batched, on one thread, so that both meet the same machine.
#     bash scripts/pocket_engines.sh          # SEEDS="0 1 2" DATASETS="seq-glyphs seq-digits" JOBS=2 OUT=results/engines
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/pocket_methods.sh
OUT=${OUT:-results/engines}
jobs=$(mktemp)
for seed in ${SEEDS:-0 1 2}; do
  for dataset in ${DATASETS:-seq-digits seq-glyphs}; do
    for row in "${METHODS[@]}"; do
      IFS='|' read -r name flags _ <<<"$row"
      case $name in ncm* | joint* | er* | derpp* | full*) continue ;; esac
      run="$PYTHON main.py $flags --dataset $dataset --seed $seed $COMMON"
      echo "($run --engine serial --results_path $OUT/serial && $run --engine batched --results_path $OUT/batched)"
    done
  done
done >"$jobs"
run_all "$jobs"
for engine in serial batched; do
  echo "--engine $engine"
  $PYTHON -m utils.compare "$OUT/$engine" --metric faa,forgetting,faa_task_il,train_seconds,total_seconds --sort faa \
    --format "${FORMAT:-table}"
done
