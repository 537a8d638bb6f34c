# Sourced by the pocket scripts: the rows of the pocket table, "name | flags | learning rates to choose from".
# A nearest-class-mean reference, the upper bound (all data in one place, all classes at once), rehearsal, whole networks
# under every aggregator, adapters, and what the adapters' methods are made of (ablations).
# ROWS="lorm livar" takes some of them.
METHODS=(
  "ncm         | --model ncm --fl |"
  "joint       | --model joint --model_config best | 0.0003 0.001 0.003"
  "er          | --model er --model_config best --fl | 0.0003 0.001 0.003"
  "derpp       | --model derpp --model_config best --fl | 0.0003 0.001 0.003"
  "sgd         | --model sgd --fl | 0.0003 0.001 0.003"
  "lwf         | --model lwf --fl | 0.0003 0.001 0.003"
  "ewc_on      | --model ewc_on --fl | 0.0003 0.001 0.003"
  "full        | --model fedavg --fl | 0.0001 0.0003 0.001 0.003"
  "fedprox     | --model fedprox --fl | 0.0003 0.001 0.003"
  "scaffold    | --model scaffold --fl | 0.0003 0.001 0.003"
  "fedsum      | --model fedsum --fl | 0.0001 0.0003 0.001"
  "ties        | --model ties_merging --fl | 0.0003 0.001 0.003"
  "fisheravg   | --model fisheravg --fl | 0.0003 0.001 0.003"
  "regmean     | --model regmean --fl | 0.0003 0.001 0.003"
  "head        | --model fedavg --model_config head --fl | 0.001 0.003 0.01 0.03 0.1 0.3"
  "lora        | --model fedavg --model_config lora --fl | 0.001 0.003 0.01 0.03"
  "ffa_lora    | --model ffa_lora --fl | 0.001 0.003 0.01 0.03 0.1"
  "livar       | --model livar --fl | 0.001 0.003 0.01 0.03"
  "lorm        | --model lorm --fl | 0.001 0.003 0.01 0.03"
  "l2p         | --model l2p --fl | 0.003 0.01 0.03 0.1"
  "dualprompt  | --model dualprompt --fl | 0.01 0.03 0.1 0.3 1"
  "coda_prompt | --model coda_prompt --fl | 0.01 0.03 0.1 0.3"
  "coda_lwf    | --model coda_lwf --fl | 0.01 0.03 0.1 0.3"
  "hgp         | --model hgp --fl | 0.003 0.01 0.03 0.1"
  "ccvr        | --model ccvr --fl | 0.0003 0.001 0.003"
  "slca        | --model slca --fl | 0.003 0.01 0.03 0.1"
  "ranpac      | --model ranpac --fl | 0.003 0.01 0.03"
  "pilora      | --model pilora --fl | 0.03 0.1 0.3 1"
  "fedproto    | --model fedproto --fl | 0.0003 0.001 0.003"
  "fedproto_fm | --model fedproto --preset fm --fl | 0.0003 0.001 0.003"
  "ewc         | --model ewc --fl | 0.0003 0.001 0.003"
  "target      | --model target --fl | 0.0003 0.001 0.003"
  "dolfin      | --model dolfin --fl | 0.001 0.003 0.01 0.03"
  "paper_energy| --model dolfin --gpm_energy paper --fl | 0.003 0.01 0.03"
  "unprojected | --model dolfin --dolfin_basis none --fl | 0.001 0.003 0.01 0.03"
)
if [ -n "${ROWS:-}" ]; then
  chosen=()
  for row in "${METHODS[@]}"; do
    case " $ROWS " in *" ${row%%[ |]*} "*) chosen+=("$row") ;; esac
  done
  METHODS=("${chosen[@]}")
fi
export OMP_WAIT_POLICY=PASSIVE
PYTHON=${PYTHON:-.venv/bin/python}
JOBS=${JOBS:-$(nproc 2>/dev/null || sysctl -n hw.ncpu)}
COMMON="--device ${DEVICE:-cpu} --num_threads 1 --loadcheck auto"

# split_flags DATASET BETA: ten clients; seq-digits has two classes a task, too few to give ten clients six images at 0.1
split_flags() {
  local clients=10
  [ "$1 $2" = "seq-digits 0.1" ] && clients=5
  echo "--dataset $1 --distribution_alpha $2 --num_clients $clients"
}

# run_all FILE: a command line each, JOBS at a time; a failing one is reported and the others go on
run_all() {
  # one argument each: BSD's -I stops at 255 bytes
  tr '\n' '\0' <"$1" | xargs -0 -n 1 -P "$JOBS" bash -c 'eval "$1" >/dev/null || echo "failed: $1" >&2' _
}
