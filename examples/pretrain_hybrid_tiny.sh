#!/usr/bin/env bash
# Trains olmo_hybrid_tiny on this machine's CPU, four ranks at TP2 x PP2, on the Python standard library's own sources.
# Run it again to go on where it stopped. Arguments are overrides: train.steps=100 run_dir=runs/short
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source tools/env.sh
config=examples/configs/pretrain_hybrid_tiny.yaml

python tools/pretrain.py "$config" "$@" --dry-run --files skip --world-size 4 >/dev/null # ends here if an override is wrong; data comes next
if [ ! -e data/tiny_train.idx ] || [ ! -e data/tiny_validation.idx ]; then
    stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    python tools/preprocess_data.py "$stdlib" --include '*.py' --exclude 'site-packages/*' 'test/*' '*/test/*' '*/tests/*' \
        --output data/tiny --split 0.99,0.01 --overwrite
fi
exec torchrun --standalone --nproc-per-node 4 tools/pretrain.py "$config" "$@"
