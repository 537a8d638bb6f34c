# Sourced by the pocket scripts: the rows of the pocket table, "name | flags | learning rates to choose from".
# A nearest-class-mean reference, the upper bound (all data in one place, all classes at once), rehearsal, and the
# federated methods with DOLFIN's ablation.
METHODS=(
  "ncm         | --model ncm --fl |"
  "joint       | --model joint --model_config best | 0.0003 0.001 0.003"
  "er          | --model er --model_config best --fl | 0.0003 0.001 0.003"
  "derpp       | --model derpp --model_config best --fl | 0.0003 0.001 0.003"
  "full        | --model fedavg --fl | 0.0001 0.0003 0.001 0.003"
  "head        | --model fedavg --model_config head --fl | 0.001 0.003 0.01 0.03 0.1 0.3"
  "lora        | --model fedavg --model_config lora --fl | 0.001 0.003 0.01 0.03"
  "ffa_lora    | --model ffa_lora --fl | 0.001 0.003 0.01 0.03 0.1"
  "dolfin      | --model dolfin --fl | 0.001 0.003 0.01 0.03"
  "paper_energy| --model dolfin --gpm_energy paper --fl | 0.003 0.01 0.03"
  "unprojected | --model dolfin --dolfin_basis none --fl | 0.001 0.003 0.01 0.03"
)
export OMP_WAIT_POLICY=PASSIVE
PYTHON=${PYTHON:-.venv/bin/python}
JOBS=${JOBS:-$(nproc 2>/dev/null || sysctl -n hw.ncpu)}
COMMON="--device cpu --num_threads 1 --loadcheck auto"

# run_all FILE: a command line each, JOBS at a time; a failing one is reported and the others go on
run_all() {
  xargs -P "$JOBS" -I{} bash -c '{} >/dev/null || echo "failed: {}" >&2' <"$1"
}
