#!/usr/bin/env bash
# Install the wheel into an empty environment and use it without the checkout: tokenize, train, plan, convert, generate and more.
#
#   bash tests/package/fresh_environment.sh                     # the versions of constraints.txt
#   bash tests/package/fresh_environment.sh torch==2.10.0       # others of the ranges in pyproject.toml
#   RESOLUTION=lowest-direct bash tests/package/fresh_environment.sh       # the lowest of the ranges; needs uv
#
# Adds the outcome to tests/package/fresh_environment.jsonl. Needs an index of packages and 6 GB in TMPDIR. RESULT=FILE names another file.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
result=$(realpath -m "${RESULT:-$root/tests/package/fresh_environment.jsonl}")
python=${HYBRID_PYTHON:-python3.12}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH VIRTUAL_ENV
export OMP_NUM_THREADS=1 PYTHONNOUSERSITE=1 CUDA_VISIBLE_DEVICES=''

echo "wheel"
mkdir "$work/source" "$work/elsewhere"
git -C "$root" ls-files -z | (cd "$root" && xargs -0 cp --parents -t "$work/source")
"$python" -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip --disable-pip-version-check --quiet)
"${pip[@]}" wheel --no-deps --wheel-dir "$work/wheels" "$work/source" "$work/source/kernels"
wheel=$(ls "$work"/wheels/megatron_hybrid-*.whl)

echo "install $(basename "$wheel") $*"
if [ -n "${RESOLUTION:-}" ]; then
    # From pyproject.toml: of the wheel, only the wheel itself would be a direct requirement.
    uv pip install --quiet --python "$work/venv/bin/python" --resolution "$RESOLUTION" -r "$root/pyproject.toml" "$@"
    "${pip[@]}" install --no-deps "$wheel"
elif [ $# -gt 0 ]; then
    "${pip[@]}" install "$wheel" "$@"
else
    "${pip[@]}" install -c "$root/constraints.txt" "$wheel"
fi
rm -r "$work/source" # nothing of the checkout is left
export PATH=$work/venv/bin:$PATH
cd "$work/elsewhere"

start=$(date +%s)
try() { echo "+ megatron-hybrid $*" && megatron-hybrid "$@"; }
stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
overrides=(run_dir=run "data.train=[{path: data_train}]" "data.validation=[{path: data_validation}]" data.sequence_length=128
    train.steps=6 train.global_batch_size=4 train.micro_batch_size=2 train.dtype=fp32 checkpoint.interval=6)
try --version
try preprocess "$stdlib/json" "$stdlib/email" --include '*.py' --output data --split 0.9,0.1
try pretrain olmo_hybrid_tiny "${overrides[@]}" --dry-run --world-size 2 >dry_run.txt
try check-data olmo_hybrid_tiny "${overrides[@]}"
try launch --cpu-ranks 2 pretrain olmo_hybrid_tiny "${overrides[@]}" --parallel.tensor_parallel_size 2
try plot run
try verify run/checkpoints/step-00000006
try convert to-hf run exported
try convert from-hf exported imported
try verify imported --against exported
try average run/checkpoints/step-00000006 imported --out averaged
try generate run --prompt 'def main():' --max-tokens 5
try evaluate run data_validation
try plan --model olmo_hybrid_7b --gpus 64 --gpu h100-80gb --sequence-length 8192 --global-batch-size 512 --emit best.yaml --top 3
try pretrain best.yaml --dry-run --world-size 64 --files skip >dry_run_7b.txt
try make-tasks stdlib tasks
try evaluate-tasks run --tasks tasks --limit 2 >tasks.json
python - "$wheel" "$(($(date +%s) - start))" "$result" "${RESOLUTION:-}$*" <<'EOF'
import datetime, importlib.metadata as m, json, pathlib, platform, sys
import megatron_hybrid
assert "site-packages" in megatron_hybrid.__file__, megatron_hybrid.__file__
wheel, seconds, result, asked = sys.argv[1:]
names = ("torch", "triton", "megatron-core", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "rich", "matplotlib")
losses = [json.loads(line).get("loss") for line in open("run/metrics.jsonl")]
row = {"date": datetime.date.today().isoformat(), "wheel": pathlib.Path(wheel).name, "versions": asked or "constraints.txt",
       "python": platform.python_version(), "installed": {name: m.version(name) for name in names},
       "commands": "all succeeded", "seconds": int(seconds), "losses": [x for x in losses if x is not None]}
with open(result, "a") as file:
    file.write(json.dumps(row) + "\n")
print(json.dumps(row, indent=1))
EOF
echo "the installed package works without the checkout"
