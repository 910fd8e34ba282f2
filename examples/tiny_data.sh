#!/usr/bin/env bash
# Makes the data of the tiny examples, once. Run it in the project's folder, in the environment of tools/env.sh.
# Training and the validation set `code` are sources of Python's standard library, as bytes. The validation set `docs` is this
# project's pages. The tasks are made from tables in the standard library.
set -euo pipefail
if [ ! -e data/tiny_train.idx ] || [ ! -e data/tiny_validation.idx ]; then
    stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    python tools/preprocess_data.py "$stdlib" --include '*.py' --exclude 'site-packages/*' 'test/*' '*/test/*' '*/tests/*' \
        --output data/tiny --split 0.99,0.01 --overwrite
fi
if [ ! -e data/tiny_docs.idx ]; then
    python tools/preprocess_data.py docs --include '*.md' --exclude 'measurements/*' 'reference/*' \
        --output data/tiny_docs --overwrite
fi
if [ ! -e data/tiny_tasks ]; then
    rm -rf data/tiny_tasks.partial
    python tools/make_tasks.py stdlib data/tiny_tasks.partial
    mv data/tiny_tasks.partial data/tiny_tasks # complete from its first moment on
fi
