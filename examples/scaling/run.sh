#!/usr/bin/env bash
# Builds the corpus, trains the ladder of sizes, architectures and token budgets, and fits the scaling law of each architecture.
# To resume, run it again. Arguments are those of ladder.py. The corpus is built in --data, and the law fits the points in --runs.
#
#   bash examples/scaling/run.sh --list                                    sizes, tokens, FLOPs and hours of all runs
#   bash examples/scaling/run.sh --gpus 1 --sizes 256/4/4 320/5/4 384/6/4 384/6/8
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
source tools/env.sh
corpus=() fit=() option=
for word in "$@"; do
    case $option in
        --data) corpus=(--output "$word") ;;
        --runs) fit=(--runs "$word") ;;
    esac
    case $word in
        --list) exec python examples/scaling/ladder.py "$@" ;;
        --data=*) corpus=(--output "${word#*=}") ;;
        --runs=*) fit=(--runs "${word#*=}") ;;
    esac
    option=$word
done
python examples/scaling/corpus.py "${corpus[@]}"
status=0
python examples/scaling/ladder.py "$@" || status=$?
if [ "$status" = 0 ]; then
    python examples/scaling/fit.py "${fit[@]}"
fi
exit "$status"
