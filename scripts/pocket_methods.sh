# Sourced by the pocket scripts: the rows of the pocket table, "name | flags".
# A nearest-class-mean reference, the upper bound, rehearsal, and the federated methods with DOLFIN's ablation.
METHODS=(
  "ncm        | --model ncm"
  "joint      | --model joint"
  "er         | --model er"
  "derpp      | --model derpp"
  "full       | --model fedavg --tuning full"
  "head       | --model fedavg --tuning head"
  "lora       | --model fedavg --tuning lora"
  "ffa_lora   | --model ffa_lora"
  "dolfin     | --model dolfin"
  "unprojected| --model dolfin --dolfin_basis none"
)
export OMP_WAIT_POLICY=PASSIVE
PYTHON=${PYTHON:-.venv/bin/python}
JOBS=${JOBS:-$(nproc 2>/dev/null || sysctl -n hw.ncpu)}
COMMON="--fl --device cpu --num_threads 1 --loadcheck auto"

# run_all FILE: a command line each, JOBS at a time; a failing one is reported and the others go on
run_all() {
  xargs -P "$JOBS" -I{} bash -c '{} >/dev/null || echo "failed: {}" >&2' <"$1"
}
