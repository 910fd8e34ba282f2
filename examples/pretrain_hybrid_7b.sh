#!/usr/bin/env bash
# Pretrains OLMo Hybrid 7B with AI2's recipe, 4 Mi tokens a step, on NODES nodes of GPUS_PER_NODE GPUs.
#
#   NODES=16 DATA='/data/olmo_mix/*.npy' RUN_DIR=/runs/olmo bash examples/pretrain_hybrid_7b.sh [section.key=value ...]
#
# On a SLURM login node it submits itself (account, partition, time: SBATCH_ACCOUNT=..., SBATCH_PARTITION=..., SBATCH_TIMELIMIT=...),
# after it has looked at the run's files; FILES=skip where only the compute nodes see them. In an allocation it starts one launcher
# per node. Without SLURM it uses this machine's GPUs, or CPU_RANKS=4 ranks on CPU.
# A job that nears its time limit saves, requeues itself and goes on; so does the same command after an interruption.
# Exit codes: 0 done, 75 saved and to be requeued, 78 wrong configuration or node, 69 no such nodes; others are a failure's own.
#SBATCH --job-name=hybrid-7b
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

root=${SLURM_JOB_ID:+${SLURM_SUBMIT_DIR:-}} # SLURM runs a copy of this file: it was submitted from the project's folder
[ -e "${root:-/nowhere}/tools/pretrain.py" ] || root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
if [ -z "${CPU_RANKS:-}" ]; then export HYBRID_EXTRAS=${HYBRID_EXTRAS:-dev,gpu}; fi # with Transformer Engine and fla
source tools/env.sh

NODES=${NODES:-${SLURM_NNODES:-8}} # 8, 16, 64: at tensor parallel 2, 8, 4, 1 micro-batches of two sequences per rank and step
config=${CONFIG:-examples/configs/pretrain_hybrid_7b.yaml}
overrides=(
    ${RUN_DIR:+"run_dir=$RUN_DIR"}
    ${DATA:+"data.train.0.path=$DATA"}
    ${VALIDATION:+"data.validation.0.path=$VALIDATION"}
    ${TP:+"parallel.tensor_parallel_size=$TP" "parallel.sequence_parallel=null"} # null: where TP > 1
    ${CP:+"parallel.context_parallel_size=$CP"}
    ${PP:+"parallel.pipeline_parallel_size=$PP"}
    "$@"
)
case ${PRECISION:-} in # bf16, or the format of the linear layers
    '') ;;
    bf16 | fp32) overrides+=("train.dtype=$PRECISION" precision.fp8_recipe=null) ;;
    *) overrides+=("precision.fp8_recipe=${PRECISION#fp8_}") ;; # fp8_delayed, fp8_tensorwise, fp8_blockwise
esac
gpus=${GPUS_PER_NODE:-${SLURM_GPUS_PER_NODE:-}}
ranks=(${gpus:+--gpus "${gpus##*:}"})
if [ -n "${CPU_RANKS:-}" ]; then ranks=(--cpu-ranks "$CPU_RANKS"); fi
launch=(python tools/launch.py "${ranks[@]}" tools/pretrain.py "$config" "${overrides[@]}")

if [ -n "${SLURM_JOB_ID:-}" ]; then # in an allocation
    srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpu-bind=none --wait=60 "${launch[@]}" &
    step=$!
    asked=yes
    trap 'asked=yes; kill -USR1 $step || true' USR1 TERM # srun hands it to every launcher, and these to their ranks
    while [ -n "$asked" ]; do # a signal ends `wait`, but not the step
        asked='' status=0
        wait $step || status=$?
    done
    # Not where the job was cancelled, nor in an interactive allocation.
    if [ $status = 75 ] && scontrol show job -o "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING .* BatchFlag=1 '; then
        echo "requeueing job $SLURM_JOB_ID: it goes on from the last step it saved"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit $status
elif command -v sbatch >/dev/null; then # on a login node
    GPUS_PER_NODE=${GPUS_PER_NODE:-8}
    world=$((NODES * ${CPU_RANKS:-$GPUS_PER_NODE}))
    python tools/pretrain.py "$config" "${overrides[@]}" --dry-run --files "${FILES:-require}" --world-size $world >/dev/null # wrong ones end here
    usable=$(sinfo -h -N -r -t idle,mix,alloc,comp -o %N ${SBATCH_PARTITION:+-p "$SBATCH_PARTITION"} | sort -u | wc -l)
    if [ "$usable" -lt "$NODES" ]; then
        echo "pretrain_hybrid_7b: $usable nodes are up${SBATCH_PARTITION:+ in $SBATCH_PARTITION} and NODES=$NODES: set NODES to" \
            "what there is, or wait; see sinfo -R. To queue it anyway: sbatch --nodes=$NODES examples/pretrain_hybrid_7b.sh" >&2
        exit 69
    fi
    wanted=(--gpus-per-node="$GPUS_PER_NODE" --exclusive --mem=0)
    if [ -n "${CPU_RANKS:-}" ]; then wanted=(); fi
    exec sbatch --nodes="$NODES" "${wanted[@]}" examples/pretrain_hybrid_7b.sh "$@" # the variables go along
else # on one machine
    exec "${launch[@]}"
fi
