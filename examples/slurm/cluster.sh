# Settings of a cluster, for batch scripts to source: modules, network, containers, logs. Every variable can be set by the caller.
#
# MODULES            modules to load: MODULES='cuda/13.0 openmpi'
# CONTAINER          image: a .sqsh or .sif file, or a name that the runtime pulls. Unset: the environment of tools/env.sh
# CONTAINER_RUNTIME  pyxis, apptainer or enroot (default: the first of them that is installed)
# CONTAINER_MOUNTS   further folders that the container sees at the same path: /data,/scratch
# LOG_DIR            folder of logs: one of the job and one of each node (default: logs)
# NCCL_*, GLOO_*     NCCL finds InfiniBand by itself. Set NCCL_SOCKET_IFNAME (ib0, bond0) where nodes have several networks, and
#                    NCCL_IB_HCA (mlx5) to choose adapters

# Load modules. Batch shells lack the function `module` on many clusters.
load_modules() {
    [ -n "${MODULES:-}" ] || return 0
    local init
    if ! declare -F module >/dev/null; then
        for init in "${LMOD_PKG:-/none}/init/bash" "${MODULESHOME:-/none}/init/bash" /etc/profile.d/lmod.sh /etc/profile.d/modules.sh; do
            if [ -r "$init" ]; then . "$init" && break; fi
        done
    fi
    if ! declare -F module >/dev/null; then
        echo "cluster.sh: MODULES=$MODULES is set, and this node has no module command; unset it, or set MODULESHOME" >&2
        return 78
    fi
    local name
    for name in $MODULES; do
        module load "$name" || { echo "cluster.sh: module load $name failed; see module avail" >&2 && return 78; }
    done
}

# Set what a run on many nodes needs. Values that the caller has set stay.
set_network() {
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"                   # a failure names the network and the peer
    export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"           # 17 s instead of 4 s: a switch that is busy does not end the run
    if [ -n "${NCCL_SOCKET_IFNAME:-}" ]; then                 # gloo, which starts the ranks, takes the same network
        export NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$NCCL_SOCKET_IFNAME}"
    fi
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # Megatron's overlap relies on launch order
}

# Set the arrays container_srun, options of srun, and container_command, words before the command.
# Arguments: folders that the container sees at the same path.
use_container() {
    container_srun=() container_command=()
    [ -n "${CONTAINER:-}" ] || return 0
    local runtime=${CONTAINER_RUNTIME:-} mounts=() nvidia=(--nv) folder joined
    if [ -n "${CPU_RANKS:-}" ]; then nvidia=(); fi
    case "$CONTAINER" in *.sqsh | *.sif) CONTAINER=$(realpath -- "$CONTAINER") || return 78 ;; esac
    if [ -z "$runtime" ]; then
        if srun --help 2>/dev/null | grep -q -- --container-image; then
            runtime=pyxis
        elif command -v apptainer >/dev/null; then
            runtime=apptainer
        elif command -v enroot >/dev/null; then
            runtime=enroot
        else
            echo "cluster.sh: CONTAINER=$CONTAINER is set, and there is no pyxis, apptainer or enroot here; unset it, or install one" >&2
            return 78
        fi
    fi
    for folder in "$@" $(tr , ' ' <<<"${CONTAINER_MOUNTS:-}"); do mounts+=("$(realpath -- "$folder"):$(realpath -- "$folder")"); done
    joined=$(IFS=, && echo "${mounts[*]}")
    case $runtime in
        pyxis) container_srun=(--container-image="$CONTAINER" --container-mounts="$joined" --container-workdir="$PWD") ;;
        apptainer) container_command=(apptainer exec "${nvidia[@]}" --bind "$joined" --pwd "$PWD" "$CONTAINER") ;;
        enroot) # passes no variables by itself; those of srun exist in the task only
            container_command=(bash "$(dirname -- "${BASH_SOURCE[0]}")/enroot_start.sh" "$joined" "$PWD" "$CONTAINER")
            ;;
        *)
            echo "cluster.sh: CONTAINER_RUNTIME=$runtime is not known; set it to pyxis, apptainer or enroot" >&2
            return 78
            ;;
    esac
}
