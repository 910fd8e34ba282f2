#!/usr/bin/env bash
# Sets up the environment, then: ruff, mypy on config/, pytest. Arguments go to pytest: bash tests/run.sh -m "not slow"
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source tools/env.sh

failed=()
python -m ruff check . || failed+=(ruff)
mypy_log=$(mktemp)
trap 'rm -f "$mypy_log"' EXIT
python -m mypy >"$mypy_log" 2>&1 & # beside pytest: it takes one core for a few seconds
mypy_pid=$!
python -m pytest "$@" || failed+=(pytest)
wait "$mypy_pid" || failed+=(mypy)
echo "mypy: $(cat "$mypy_log")"
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
