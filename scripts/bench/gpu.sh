#!/usr/bin/env bash
# What docs/performance.md says of a GPU, one measurement after the other.
#     bash scripts/bench/gpu.sh        # OUT=results/bench_gpu PYTHON=.venv/bin/python ONLY="vit pocket"
set -u
cd "$(dirname "$0")/../.."
OUT=${OUT:-results/bench_gpu}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$OUT"
measure() { # name of the files, script, its flags
  local name=$1 script=$2
  shift 2
  [[ -z "${ONLY:-}" || " $ONLY " == *" $name "* ]] || return 0
  echo "== $script $*"
  "$PYTHON" "scripts/bench/$script" --device cuda --out "$OUT/$name.csv" "$@" 2>&1 | tee "$OUT/$name.log"
}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
measure vit batched.py --repeats 5 --cases "vit lora bf16" "vit lora fp32"
measure pocket batched.py --repeats 5 --cases "vit-pocket lora" "vit-pocket dolfin" "vit-pocket whole"
measure soft_dtw soft_dtw.py
measure spiking spiking.py --batch 32 --channels 3 --pixels 32
measure tangent task_arithmetic.py --vit_name vit_base_patch16_224 --batch 32
measure queries queries.py
