#!/usr/bin/env bash
# Makes the data of the tiny examples, once: the Python standard library's own sources as bytes. Run it in the project's folder,
# in the environment of tools/env.sh.
set -euo pipefail
if [ ! -e data/tiny_train.idx ] || [ ! -e data/tiny_validation.idx ]; then
    stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    python tools/preprocess_data.py "$stdlib" --include '*.py' --exclude 'site-packages/*' 'test/*' '*/test/*' '*/tests/*' \
        --output data/tiny --split 0.99,0.01 --overwrite
fi
