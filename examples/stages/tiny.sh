#!/usr/bin/env bash
# Runs all stages of OLMo Hybrid in miniature on two CPU ranks: pretraining, two mid-training runs, their average, long context.
# It makes the environment and the data first. runs/tiny_stages/loss.png shows the loss of all stages. To resume after an
# interruption, run it again. Arguments are options and overrides of tools/run_stages.py: --folder runs/other train.z_loss=0
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
source tools/env.sh
bash examples/tiny_data.sh
exec python tools/run_stages.py examples/stages/tiny/stages.yaml --cpu-ranks 2 "$@"
