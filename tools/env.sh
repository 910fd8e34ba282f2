# The environment of every command: `source tools/env.sh` (bash). Makes it when it is missing, and activates it.
#
# HYBRID_EXTRAS selects the extras of pyproject.toml: dev (the default), gpu for training, dev,gpu, ..., or empty. Each selection has an
# environment of its own in .venv/, and so has each change of the requirements. An environment never changes once it is complete, so that
# running jobs keep theirs. Versions are those of constraints.txt. HYBRID_PYTHON names the Python; otherwise it is the first 3.12 or 3.13
# found. A machine without a GPU gets no gpu extra, unless it has sbatch (a login node) or HYBRID_ALLOW_NO_GPU=1 (building an image).
# HYBRID_SYSTEM_SITE_PACKAGES=1: the environment sees the packages of that Python, such as the PyTorch of a container image.

if [ -z "${BASH_VERSION:-}" ]; then echo "tools/env.sh: source this from bash" >&2 && return 1; fi

_hybrid_python() { # print a Python that will do
    local candidate
    for candidate in "${HYBRID_PYTHON:-}" python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3 \
        "$HOME"/.local/share/uv/python/cpython-3.12*/bin/python3.12 python3 python3.13 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python3; do
        if [ -n "$candidate" ] && "$candidate" -c \
            'import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    echo "tools/env.sh: no Python 3.12 or 3.13 with venv here. Install one (apt install python3.12-venv, pyenv install 3.12," \
        "uv python install 3.12) or name it: HYBRID_PYTHON=/path/to/python3.12" >&2
    return 1
}

_hybrid_gpu_reason() { # extras: fail, and say why, if they are of no use on this machine
    case ",$1," in *,gpu,*) ;; *) return 0 ;; esac
    if [ -n "${HYBRID_ALLOW_NO_GPU:-}" ] || command -v sbatch >/dev/null || nvidia-smi -L 2>/dev/null | grep -q .; then return 0; fi
    echo "tools/env.sh: HYBRID_EXTRAS=$1 is for NVIDIA GPUs, and nvidia-smi finds none here; nothing was installed. For ranks on CPU, set" \
        "HYBRID_EXTRAS=dev (and CPU_RANKS=4 for the examples). To install without a GPU, set HYBRID_ALLOW_NO_GPU=1" >&2
    return 1
}

_hybrid_install() ( # root extras venv constraints. A subshell, so that descriptor and folder stay its own
    root=$1 extras=$2 venv=$3 constraints=$4 start=$(date +%s) log=$3.log
    mkdir -p "$root/.venv" && exec 9>"$venv.lock" || return 1
    if command -v flock >/dev/null && ! flock -n 9; then
        echo "tools/env.sh: another process is installing into $venv: waiting" >&2
        flock 9 || return 1
    fi
    if [ -e "$venv/.complete" ]; then return 0; fi # done by who held the lock
    python=$(_hybrid_python) || return 1
    echo "tools/env.sh: making $venv with $("$python" -V 2>&1) ($python)" >&2
    rm -rf "$venv" && "$python" -m venv ${HYBRID_SYSTEM_SITE_PACKAGES:+--system-site-packages} "$venv" || return 1 # what an interrupted installation left was never used
    echo "tools/env.sh: installing megatron-hybrid${extras:+[$extras]}, some minutes the first time (log: $log)" >&2
    cd "$root" && : >"$log" || return 1
    # What is compiled (the gpu extra) needs torch to be there first, and so no build isolation either.
    case ",$extras," in *,gpu,*) first=. ;; *) first= ;; esac
    for what in 'setuptools>=77,<82' $first ".${extras:+[$extras]}"; do
        case $what in .*) set -- --no-build-isolation -e "$what" ;; *) set -- "$what" ;; esac
        "$venv/bin/python" -m pip install -q --disable-pip-version-check -c "$constraints" "$@" </dev/null >>"$log" 2>&1 || {
            tail -n 20 "$log" >&2
            return 1
        }
    done
    touch "$venv/.complete" || return 1
    echo "tools/env.sh: ready after $(($(date +%s) - start)) s" >&2
    others=$(cd "$root/.venv" && ls -d -- "$(basename "${venv%-*}")"-*/ 2>/dev/null | grep -vF "$(basename "$venv")/" | tr '\n' ' ')
    if [ -n "$others" ]; then echo "tools/env.sh: of earlier requirements, in .venv: $others- remove them when no job uses them" >&2; fi
)

_hybrid_env() {
    local root extras constraints key venv
    root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P) || return 1
    extras=${HYBRID_EXTRAS-dev} constraints=constraints.txt
    case ",$extras," in *,olmo-core,*) constraints=constraints-olmo-core.txt ;; esac
    # The requirements are the [project] tables; an environment cannot be moved, so its place counts as well.
    key=$({ sed -n '/^\[project/,/^\[tool/p' "$root/pyproject.toml" && cat -- "$root/$constraints" && echo "$root"; } | cksum) || return 1
    venv=$root/.venv/${extras:-base}
    venv=${venv//,/-}-$(printf '%08x' "${key%% *}")
    if [ ! -e "$venv/.complete" ]; then
        _hybrid_gpu_reason "$extras" && _hybrid_install "$root" "$extras" "$venv" "$constraints" || {
            echo "tools/env.sh: the environment could not be made" >&2
            return 1
        }
    fi
    if [ "$(command -v python)" != "$venv/bin/python" ]; then
        . "$venv/bin/activate" || return 1
    fi
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # a rank on CPU is one thread: there are as many ranks as cores or more
    export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"           # tokenizers warn after every fork otherwise
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"     # Megatron's overlap relies on launch order
}

_hybrid_env
