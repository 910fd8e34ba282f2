#!/usr/bin/env bash
# Write constraints.txt and constraints-olmo-core.txt: the exact versions that tools/env.sh, Docker and CI install. Needs uv (pip install
# uv) and an index of packages. Versions that are there and allowed by pyproject.toml stay; to take newer ones: tools/lock.sh --upgrade
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

lock() { # file, then options with the extras
    uv pip compile pyproject.toml --quiet --universal --python 3.12 --no-annotate --no-header --no-emit-index-url --output-file "$@"
    local said="# Written by tools/lock.sh from pyproject.toml. Do not edit."
    printf '%s\n%s\n' "$said" "$(cat "$1")" >"$1"
}

extras=(dev gpu tilelang deepspeed tasks mpi wandb parquet muon)
lock constraints.txt "${extras[@]/#/--extra=}" "$@"
# OLMo-core excludes versions that the other packages have: it is installed only to test conversion.
if [ ! -e constraints-olmo-core.txt ]; then cp constraints.txt constraints-olmo-core.txt; fi
lock constraints-olmo-core.txt --extra=dev --extra=deepspeed --extra=mpi --extra=olmo-core --extra=parquet --extra=tasks "$@"
