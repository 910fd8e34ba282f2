#!/usr/bin/env bash
# Fault-injection campaign on CPU ranks: `bash tests/faults/campaign.sh [PART ...]`. Parts: saves, runs (default: those that exist).
# Writes benchmarks/results/faults_PART-cpu.json. Exits with status 1 if any case fails.
set -u
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && . tools/env.sh || exit 2
rows=$(mktemp -d) && trap 'rm -rf "$rows"' EXIT
status=0
for part in "${@:-saves runs}"; do
    for name in $part; do
        [ -f "tests/faults/$name.py" ] || continue
        python -m "tests.faults.$name" --rows "$rows/$name.json" || status=1
        [ -f "$rows/$name.json" ] && python benchmarks/faults.py "$name" "$rows/$name.json"
    done
done
exit $status
