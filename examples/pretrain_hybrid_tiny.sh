#!/usr/bin/env bash
# Trains olmo_hybrid_tiny on this machine's CPU, four ranks at TP2 x PP2, on the Python standard library's own sources.
# To resume after an interruption, run it again. Arguments are overrides: train.steps=100 run_dir=runs/short
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source tools/env.sh
config=examples/configs/pretrain_hybrid_tiny.yaml

python tools/pretrain.py "$config" "$@" --dry-run --files skip --world-size 4 >/dev/null # ends here if an override is wrong; data comes next
bash examples/tiny_data.sh
exec torchrun --standalone --nproc-per-node 4 tools/pretrain.py "$config" "$@"
