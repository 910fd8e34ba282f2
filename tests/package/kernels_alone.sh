#!/usr/bin/env bash
# Install the wheel of hybrid-kernels alone into an empty environment and test its operations without the checkout's packages.
#
#   bash tests/package/kernels_alone.sh
#
# Adds the outcome to tests/package/fresh_environment.jsonl. Needs an index of packages and 6 GB in TMPDIR. RESULT=FILE names another file.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
result=$(realpath -m "${RESULT:-$root/tests/package/fresh_environment.jsonl}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH VIRTUAL_ENV
export OMP_NUM_THREADS=1 PYTHONNOUSERSITE=1 CUDA_VISIBLE_DEVICES=''

echo "wheel"
mkdir "$work/source" "$work/elsewhere"
git -C "$root" ls-files -z kernels tests/__init__.py tests/conftest.py tests/kernels | (cd "$root" && xargs -0 cp --parents -t "$work/source")
"${HYBRID_PYTHON:-python3.12}" -m venv "$work/venv"
export PATH=$work/venv/bin:$PATH
pip=(python -m pip --disable-pip-version-check --quiet)
"${pip[@]}" wheel --no-deps --wheel-dir "$work/wheels" "$work/source/kernels"
"${pip[@]}" install -c "$root/constraints.txt" "$work"/wheels/hybrid_kernels-*.whl pytest pytest-timeout
mv "$work/source/tests" "$work/elsewhere/tests"
rm -r "$work/source" # nothing else of the checkout is left
cd "$work/elsewhere"

tests=(tests/kernels/test_{conv_gates,gated_delta_rule,gated_delta_step,gated_rmsnorm,head_norm_rope,qk_norm_rope}.py)
start=$(date +%s)
python -m pytest -q -p no:cacheprovider -k "not ranks" "${tests[@]}" --junit-xml report.xml
python - "$(ls "$work"/wheels)" "$(($(date +%s) - start))" "$result" <<'EOF2'
import datetime, importlib.metadata as m, importlib.util, json, platform, sys, xml.etree.ElementTree as xml
import hybrid_kernels
assert "site-packages" in hybrid_kernels.__file__, hybrid_kernels.__file__
assert not [name for name in ("megatron", "megatron_hybrid", "transformers") if importlib.util.find_spec(name)]
wheel, seconds, result = sys.argv[1:]
suite = xml.parse("report.xml").find("testsuite").attrib
counts = {name: int(suite[name]) for name in ("tests", "failures", "errors", "skipped")}
assert counts["tests"] > counts["skipped"] and not counts["failures"] + counts["errors"], counts
row = {"date": datetime.date.today().isoformat(), "wheel": wheel, "versions": "constraints.txt", "python": platform.python_version(),
       "installed": {name: m.version(name) for name in ("torch", "triton")}, "pytest": counts, "seconds": int(seconds)}
with open(result, "a") as file:
    file.write(json.dumps(row) + "\n")
print(json.dumps(row, indent=1))
EOF2
echo "hybrid-kernels works without other packages of the checkout"
