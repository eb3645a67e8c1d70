#!/usr/bin/env bash
# scripts/launch_slurm.sh train RECIPE.toml [KEY=VALUE]... [--sae NAME]
#
# A job of Slurm that trains data-parallel, one process a GPU, on all nodes that it was given; from the repository's folder:
#
#   sbatch --nodes 2 --gpus-per-node 8 scripts/launch_slurm.sh train pipelines/recipes/llama3_8b_resid15_batchtopk.toml
#
# Cache first: `saekit cache RECIPE.toml`, into a folder that all nodes see. When a process dies, all of them start again from
# the newest checkpoint, $RESTARTS times (3). Submit the same again to go on after that, on any number of nodes. Python is that of .venv where there is one, else python3 or $PYTHON.

#SBATCH --job-name=saekit
#SBATCH --ntasks-per-node=1
#SBATCH --output=saekit-%j.log

set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,/^$/{ s/^# \{0,1\}//p; }' "$0"
  exit 0
fi
if [[ -z ${SLURM_JOB_NODELIST:-} ]]; then
  echo "scripts/launch_slurm.sh: no Slurm job here, needs sbatch: sbatch --nodes N --gpus-per-node 8 scripts/launch_slurm.sh train RECIPE.toml" >&2
  exit 2
fi
if [[ ${1:-} != train || $# -lt 2 ]]; then
  echo "scripts/launch_slurm.sh: found '$*', needs train RECIPE.toml; the other stages run in one process" >&2
  exit 2
fi

# Slurm runs a copy of this file from a folder of its own.
root=${SLURM_SUBMIT_DIR:-$PWD}
python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -x $root/.venv/bin/python ]]; then python=$root/.venv/bin/python; fi
gpus=${SLURM_GPUS_ON_NODE:-8}
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
main=${nodes%%$'\n'*}

# A meeting place of its own for each start: one that is shared (torch 2.13) keeps the addresses of processes that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# The rank of a node is known only on it.
# shellcheck disable=SC2016
exec srun --ntasks-per-node=1 bash -c 'exec "$@" --machine_rank "$SLURM_NODEID" -m saekit_pipelines '"$(printf '%q ' "$@")" \
  saekit "$python" -m accelerate.commands.launch --config_file "$root/pipelines/launch/nx8.yaml" \
  --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * gpus))" \
  --main_process_ip "$main" --main_process_port "${MASTER_PORT:-29500}" --max_restarts "${RESTARTS:-3}"
