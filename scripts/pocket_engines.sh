#!/usr/bin/env bash
# The rows of the pocket table that the batched engine can stack, on both engines: same numbers, other seconds.
# A row runs serially, then batched, on one thread, so that both meet the same machine.
#     bash scripts/pocket_engines.sh          # SEEDS="0 1 2" JOBS=2 OUT=results/engines ENGINES="serial batched"
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/pocket_methods.sh
OUT=${OUT:-results/engines}
ENGINES=${ENGINES:-serial batched}
jobs=$(mktemp)
for seed in ${SEEDS:-0 1 2}; do
  for dataset in ${DATASETS:-seq-digits seq-glyphs}; do
    for row in "${METHODS[@]}"; do
      IFS='|' read -r name flags _ <<<"$row"
      case $name in ncm* | joint* | er* | derpp* | full* | fedprox* | scaffold* | fedsum* | ties* | fisher* | regmean*) continue ;; esac
      line=true
      for engine in $ENGINES; do
        line+=" && $PYTHON main.py $flags --dataset $dataset --seed $seed $COMMON --engine $engine --results_path $OUT/$engine"
      done
      echo "($line)"
    done
  done
done >"$jobs"
run_all "$jobs"
for engine in $ENGINES; do
  echo "--engine $engine"
  $PYTHON -m utils.compare "$OUT/$engine" --metric faa,forgetting,faa_task_il,train_seconds,total_seconds --sort faa \
    --format "${FORMAT:-table}"
done
