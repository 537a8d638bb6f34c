#!/usr/bin/env bash
# Runs the commands of a paper's ledger (reproduce/<paper>.yaml), each with its seeds, then shows theirs beside ours.
#     bash scripts/reproduce.sh PAPER [--dry-run]    # SEEDS="0 1" JOBS=1 OUT=results MORE="--savecheck task --base_path /data/"
# Cells that cannot be run here are named and left out. Runs that are finished are not run again.
# MORE may say where and how runs are carried out; what changes their numbers would make them other runs.
set -euo pipefail
cd "$(dirname "$0")/.."
JOBS=${JOBS:-1} # these runs fill a GPU
source scripts/pocket_methods.sh
case $#${2:-} in
  1 | 2--dry-run) paper=$1 ;;
  *) echo "usage: bash scripts/reproduce.sh PAPER [--dry-run]" >&2 && exit 2 ;;
esac
OUT=${OUT:-results}
jobs=$(mktemp)
trap 'rm -f "$jobs"' EXIT
$PYTHON -m utils.ledger "$paper" ${SEEDS:+--seeds $SEEDS} | while read -r command; do
  echo "$PYTHON ${command#python } --loadcheck auto --results_path $OUT ${MORE:-}"
done >"$jobs"
if [ "${2:-}" = --dry-run ]; then
  cat "$jobs"
  exit
fi
run_all "$jobs"
$PYTHON -m utils.compare "$OUT" --paper "$paper" --format "${FORMAT:-table}"
