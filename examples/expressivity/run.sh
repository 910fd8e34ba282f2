#!/usr/bin/env bash
# Trains the grid of models, learning rates and seeds of a task, several runs per GPU, and writes a result file and a figure.
# To resume, run it again.
#
#   bash examples/expressivity/run.sh --task state_tracking --gpus 2 --runs-per-gpu 10
#   bash examples/expressivity/run.sh --task state_tracking_small          on two CPU cores, about ten minutes
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
source tools/env.sh
exec python examples/expressivity/grid.py "$@"
