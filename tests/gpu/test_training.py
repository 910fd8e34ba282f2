"""The trainer's own path on a GPU, against the same run on the CPU of the same machine."""

import json
import os
import subprocess
import sys

import pytest

CODE = """
import json, sys
from tests import jobs
result = jobs.curve(**json.loads(sys.argv[1]))
print(json.dumps({"losses": result["losses"], "norms": result["norms"]}))
"""
MODEL = dict(
    layer_pattern="GGGA",
    hidden_size=128,
    ffn_hidden_size=256,
    vocab_size=257,
    num_attention_heads=4,
    gdn=dict(num_key_heads=4, num_value_heads=4, key_head_dim=96, value_head_dim=192),
)


def curve(device: str, root, dtype: str, steps: int = 10) -> dict:
    """Losses and gradient norms of some steps, in a process of its own."""
    job = dict(
        model=MODEL,
        parallel={},
        train=dict(steps=steps, global_batch_size=4, micro_batch_size=2, dtype=dtype, optimizer=dict(eps=1e-2)),
        steps=steps,
    )
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(job)], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2)])
def test_same_curve_as_the_cpu(dtype, tolerance, root):
    cpu, gpu = curve("cpu", root, "fp32"), curve("gpu", root, dtype)
    for what, allowed in (("losses", tolerance), ("norms", 10 * tolerance)):
        for step, (a, b) in enumerate(zip(cpu[what], gpu[what], strict=True)):
            assert abs(a - b) <= allowed * abs(a), f"{what} at step {step}: {a} on the CPU, {b} on the GPU"
