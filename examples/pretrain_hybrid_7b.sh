#!/usr/bin/env bash
# Pretrains OLMo Hybrid 7B with AI2's recipe, 4 Mi tokens per step, on NODES nodes of GPUS_PER_NODE GPUs.
#
#   NODES=16 DATA='/data/olmo_mix/*.npy' VALIDATION='/data/validation/*.npy' RUN_DIR=/runs/olmo \
#       bash examples/pretrain_hybrid_7b.sh [section.key=value ...]
#
# On a SLURM login node it checks the run's files and submits itself; FILES=skip where only the compute nodes see them. In an
# allocation it starts one launcher per node. Without SLURM it uses this machine's GPUs, or CPU_RANKS=4 ranks on CPU.
# Relative paths start from the folder in which it is called. docs/guides/clusters.md describes all variables: the run's
# (CONFIG, DATA, VALIDATION, RUN_DIR, TP, CP, PP, PRECISION), the job's (NODES, GPUS_PER_NODE, EXCLUSIVE, MEM, DEPENDENCY, ARRAY,
# SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT) and the cluster's (examples/slurm/cluster.sh).
# A job that nears its time limit saves, requeues itself and continues. To resume after an interruption, run the same command again.
# Exit codes: 0 done, 75 saved and to be requeued, 78 wrong configuration or node, 69 no such nodes; others are a failure's own.
#SBATCH --job-name=hybrid-7b
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

fail() { echo "pretrain_hybrid_7b: $*" >&2 && exit 78; }

job=${SLURM_JOB_ID:-}
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
# SLURM runs a copy of this file: the project is where the login node said, or where sbatch was called.
for root in "${HYBRID_ROOT:-/none}" ${job:+"${SLURM_SUBMIT_DIR:-/none}"} "$(dirname -- "${BASH_SOURCE[0]}")/.."; do
    if [ -e "$root/tools/pretrain.py" ]; then break; fi
done
root=$(cd -- "$root" && pwd -P)
[ -e "$root/tools/pretrain.py" ] || fail "$root is not the project's folder; submit from it, or set HYBRID_ROOT"
export HYBRID_ROOT=$root
. "$root/examples/slurm/cluster.sh"

if [ -z "${CPU_RANKS:-}${job}" ] && ! command -v sbatch >/dev/null && ! nvidia-smi -L >/dev/null 2>&1; then
    fail "this machine has no GPU and no SLURM; set CPU_RANKS=4 for ranks on CPU" # before anything is installed
fi
load_modules
set_network
if [ -z "${CONTAINER:-}" ] || [ -z "$job" ]; then
    # Transformer Engine and fla only where ranks run on GPUs in this environment
    if [ -z "${CPU_RANKS:-}${CONTAINER:-}" ]; then export HYBRID_EXTRAS=${HYBRID_EXTRAS:-gpu}; fi
    if [ -n "${CONTAINER:-}" ]; then export HYBRID_EXTRAS=${HYBRID_EXTRAS-}; fi # the login node only checks the run
    . "$root/tools/env.sh"
else
    export PYTHONPATH=$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH} # the image brings the libraries, the checkout the code
fi

NODES=${NODES:-${SLURM_NNODES:-8}} # 8, 16, 64: at tensor parallel 2, 8, 4, 1 micro-batches of two sequences per rank and step
config=${CONFIG:-$root/examples/configs/pretrain_hybrid_7b.yaml}
LOG_DIR=$(realpath -m -- "${LOG_DIR:-logs}")
overrides=(
    ${RUN_DIR:+"run_dir=$RUN_DIR"}
    ${DATA:+"data.train.0.path=$DATA"}
    ${VALIDATION:+"data.validation.0.path=$VALIDATION"}
    ${TP:+"parallel.tensor_parallel_size=$TP" "parallel.sequence_parallel=null"} # null: where TP > 1
    ${CP:+"parallel.context_parallel_size=$CP"}
    ${PP:+"parallel.pipeline_parallel_size=$PP"}
    "$@"
)
# the default configuration has .npy shards, whose type must be known; a .bin / .idx pair knows its own
case ${DATA:-.npy} in *.npy) ;; *) overrides=(data.train.0.dtype=null "${overrides[@]}") ;; esac
case ${VALIDATION:-.npy} in *.npy) ;; *) overrides=(data.validation.0.dtype=null "${overrides[@]}") ;; esac
case ${PRECISION:-} in # bf16, or the format of the linear layers
    '') ;;
    bf16 | fp32) overrides+=("train.dtype=$PRECISION" precision.fp8_recipe=null) ;;
    *) overrides+=("precision.fp8_recipe=${PRECISION#fp8_}") ;; # fp8_delayed, fp8_tensorwise, fp8_blockwise
esac
if [ -n "${ARRAY:-}" ] && [[ "$(printf '%s\n' "${overrides[@]}" | grep '^run_dir=' | tail -n 1)" != *'{task}'* ]]; then
    fail "ARRAY=$ARRAY: the tasks would share a run folder; set RUN_DIR to a path with {task}, the number of the task"
fi
overrides=("${overrides[@]//\{task\}/${SLURM_ARRAY_TASK_ID:-0}}")
gpus=${GPUS_PER_NODE:-${SLURM_GPUS_PER_NODE:-}}
ranks=(${gpus:+--gpus "${gpus##*:}"})
if [ -n "${CPU_RANKS:-}" ]; then ranks=(--cpu-ranks "$CPU_RANKS"); fi
launch=(python "$root/tools/launch.py" "${ranks[@]}" "$root/tools/pretrain.py" "$config" "${overrides[@]}")

if [ -n "$job" ]; then # in an allocation
    mkdir -p "$LOG_DIR"
    use_container "$root" "$PWD" "$LOG_DIR"
    node_log="$LOG_DIR/${SLURM_JOB_NAME:-hybrid-7b}-$job-node%n-%N.log"
    echo "job $job on ${SLURM_JOB_NODELIST:-this node}: one log per node, $node_log"
    # shellcheck disable=SC2086 # SRUN_OPTIONS holds several words
    srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpu-bind=none --wait=60 --output="$node_log" --open-mode=append \
        "${container_srun[@]}" ${SRUN_OPTIONS:-} "${container_command[@]}" "${launch[@]}" &
    step=$!
    asked=yes
    trap 'asked=yes; kill -USR1 $step || true' USR1 TERM # srun forwards it to every launcher, and these to their ranks
    while [ -n "$asked" ]; do # a signal ends `wait`, but not the step
        asked='' status=0
        wait $step || status=$?
    done
    # Not where the job was cancelled, nor in an interactive allocation.
    if [ $status = 75 ] && scontrol show job -o "$job" | grep -q 'JobState=RUNNING .* BatchFlag=1 '; then
        echo "requeueing job $job: it continues from the last step it saved"
        scontrol requeue "$job"
    fi
    exit $status
elif command -v sbatch >/dev/null; then # on a login node
    GPUS_PER_NODE=${GPUS_PER_NODE:-8}
    whole=yes # nodes, with all their memory
    if [ -n "${CPU_RANKS:-}" ]; then whole=no; fi
    wanted=(--nodes="$NODES")
    if [ -z "${CPU_RANKS:-}" ]; then wanted+=(--gpus-per-node="$GPUS_PER_NODE"); fi
    case ${EXCLUSIVE:-$whole} in
        yes) wanted+=(--exclusive --mem="${MEM:-0}") ;;
        no) wanted+=(${MEM:+--mem="$MEM"}) ;;
        *) fail "EXCLUSIVE=$EXCLUSIVE: set it to yes for whole nodes, or no" ;;
    esac
    wanted+=(${DEPENDENCY:+--dependency="$DEPENDENCY"} ${ARRAY:+--array="$ARRAY"})
    world=$((NODES * ${CPU_RANKS:-$GPUS_PER_NODE}))
    python "$root/tools/pretrain.py" "$config" "${overrides[@]}" --dry-run --files "${FILES:-require}" --world-size $world >/dev/null # wrong ones end here
    usable=$(sinfo -h -N -r -t idle,mix,alloc,comp -o %N ${SBATCH_PARTITION:+-p "$SBATCH_PARTITION"} | sort -u | wc -l)
    if [ "$usable" -lt "$NODES" ]; then
        echo "pretrain_hybrid_7b: $usable nodes are up${SBATCH_PARTITION:+ in $SBATCH_PARTITION} and NODES=$NODES: set NODES to" \
            "what there is, or wait; see sinfo -R. To queue it anyway: sbatch --nodes=$NODES examples/pretrain_hybrid_7b.sh" >&2
        exit 69
    fi
    if [ -z "${SBATCH_OUTPUT:-}" ]; then
        mkdir -p "$LOG_DIR"
        wanted+=(--output="$LOG_DIR/%x-$([ -n "${ARRAY:-}" ] && echo %A_%a || echo %j).log")
    fi
    exec sbatch "${wanted[@]}" "$root/examples/pretrain_hybrid_7b.sh" "$@" # the variables go along
else # on one machine
    exec "${launch[@]}"
fi
