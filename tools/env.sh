# The environment of every command: `source tools/env.sh` (bash). Makes .venv in the project's folder when it is missing or
# older than setup.py / pyproject.toml, and activates it. Installs the extras in HYBRID_EXTRAS (dev; e.g. dev,gpu) with
# the Python in HYBRID_PYTHON, or the first 3.12 or 3.13 it finds. Says something only while it installs.
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

_hybrid_install() ( # root extras stamp key. A subshell, so that descriptor and folder stay its own
    root=$1 venv=$1/.venv extras=$2 stamp=$3 key=$4 start=$(date +%s)
    mkdir -p "$venv" && exec 9>"$venv/.lock" || return 1
    if command -v flock >/dev/null && ! flock -n 9; then
        echo "tools/env.sh: another process is installing into $venv: waiting" >&2
        flock 9 || return 1
    fi
    if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then return 0; fi # done by who held the lock
    if ! { "$venv/bin/python" -c 'import pip' && grep -qF "$venv" "$venv/bin/activate"; } 2>/dev/null; then # none, or moved
        python=$(_hybrid_python) || return 1
        echo "tools/env.sh: making $venv with $("$python" -V 2>&1) ($python)" >&2
        find "$venv" -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} + && "$python" -m venv ${HYBRID_SYSTEM_SITE_PACKAGES:+--system-site-packages} "$venv" || return 1
    fi
    echo "tools/env.sh: installing megatron-hybrid[$extras], some minutes the first time (log: $venv/install.log)" >&2
    cd "$root" && : >"$venv/install.log" || return 1
    # What is compiled (the gpu extra) needs torch to be there first, and so no build isolation either.
    case ",$extras," in *,gpu,*) first=. ;; *) first= ;; esac
    for what in 'setuptools>=77,<82' $first ".[$extras]"; do
        case $what in .*) set -- --no-build-isolation -e "$what" ;; *) set -- "$what" ;; esac
        "$venv/bin/python" -m pip install -q --disable-pip-version-check "$@" </dev/null >>"$venv/install.log" 2>&1 || {
            tail -n 20 "$venv/install.log" >&2
            return 1
        }
    done
    printf '%s\n' "$key" >"$stamp" || return 1
    echo "tools/env.sh: ready after $(($(date +%s) - start)) s" >&2
)

_hybrid_env() {
    local root venv extras stamp key
    root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P) || return 1
    venv=$root/.venv extras=${HYBRID_EXTRAS:-dev}
    stamp=$venv/.installed-${extras//,/-}
    key="$(cat -- "$root/setup.py" "$root/pyproject.toml" | cksum) $root"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$key" ] || [ ! -x "$venv/bin/python" ]; then
        _hybrid_install "$root" "$extras" "$stamp" "$key" || {
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
