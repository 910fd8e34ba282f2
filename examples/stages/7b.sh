#!/usr/bin/env bash
# Runs all stages of a 7B recipe: one job per stage on a SLURM login node, else one after the other on this machine's GPUs.
#
#   bash examples/stages/7b.sh olmo_hybrid_7b --folder /runs/olmo [options and overrides of tools/run_stages.py]
#
# All stages are checked before the first is submitted; --dry-run stops after that and prints the jobs. FILES=skip where only the
# compute nodes see the data. Account, partition and time limit: SBATCH_ACCOUNT=..., SBATCH_PARTITION=..., SBATCH_TIMELIMIT=...
# A job that nears its time limit saves, requeues itself and continues; the stages after it wait. To continue after a failure, cancel
# what is still in the queue and run the same command again.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
export HYBRID_EXTRAS=${HYBRID_EXTRAS:-gpu} # with Transformer Engine and fla
source tools/env.sh
recipe=examples/stages/${1:?olmo_hybrid_7b or olmo3_7b}/stages.yaml
shift
slurm=()
if command -v sbatch >/dev/null; then slurm=(--slurm --world-size "${WORLD_SIZE:-128}" --files "${FILES:-require}"); fi
exec python tools/run_stages.py "$recipe" "${slurm[@]}" "$@"
