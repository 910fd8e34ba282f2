#!/usr/bin/env bash
# Sets up the environment, then: ruff, mypy, pytest. Arguments go to pytest: bash tests/run.sh -m "not slow"
# Three tests run at a time, as most of them use one core and many wait: one at a time by -n 0, and where there is a GPU.
# A worker takes a whole file, so that what its tests share is made once; the longest files come first (tests/conftest.py).
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source tools/env.sh

failed=()
python -m ruff check . || failed+=(ruff)
mypy_log=$(mktemp)
trap 'rm -f "$mypy_log"' EXIT
python -m mypy >"$mypy_log" 2>&1 & # while pytest runs: it takes one core for a few seconds
mypy_pid=$!
workers=3
if nvidia-smi -L >/dev/null 2>&1; then workers=0; fi
python -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@" || failed+=(pytest)
wait "$mypy_pid" || failed+=(mypy)
echo "mypy: $(cat "$mypy_log")"
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
