"""The trainer's own path on GPUs: one GPU against the CPU of the same machine, layouts and formats against one GPU."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

MODEL = dict(
    layer_pattern="GGGA",
    hidden_size=256,
    ffn_hidden_size=512,
    vocab_size=257,
    num_attention_heads=2,
    gdn=dict(num_key_heads=6, num_value_heads=6, key_head_dim=96, value_head_dim=192),
)
STEPS = 10


def job(parallel: dict | None = None, dtype: str = "fp32", precision: dict | None = None, **more) -> dict:
    return (
        dict(
            model=MODEL | more.pop("model", {}),
            parallel=parallel or {},
            train=dict(steps=STEPS, global_batch_size=8, micro_batch_size=1, dtype=dtype, optimizer=dict(eps=1e-2)),
            precision=precision or {},
            steps=STEPS,
            sequence_length=256,
        )
        | more
    )


def layout(tp=1, pp=1, vpp=1, **more) -> dict:
    return dict(tensor_parallel_size=tp, pipeline_parallel_size=pp, virtual_pipeline_parallel_size=vpp, **more)


FORMATS = {
    "fp8 delayed": dict(linear="fp8_delayed"),
    "fp8 tensorwise": dict(linear="fp8_tensorwise"),
    "fp8 blockwise": dict(linear="fp8_blockwise"),
    "fp8 delayed, attention": dict(linear="fp8_delayed", attention="fp8"),
    "fp8 tensorwise, attention": dict(linear="fp8_tensorwise", attention="fp8"),
    "fp8 tensorwise, ends in bf16": dict(linear="fp8_tensorwise", bf16_layers_at_start=1, bf16_layers_at_end=1),
}
RESUMED = ["bf16", "fp8 delayed, attention", "fp8 tensorwise, attention"]
WIDE = dict(model=dict(num_attention_heads=4))  # so that four ranks have heads; 6 Gated DeltaNet heads are padded to 8
OVERLAP = dict(overlap_grad_reduce=True, overlap_param_gather=True)
LAYOUTS = {
    2: {
        "TP2": layout(2),
        "TP2, no sequence parallelism": layout(2, sequence_parallel=False),
        "PP2": layout(pp=2),
        "PP2, VPP2": layout(pp=2, vpp=2),
        "DP2, overlapped": layout(**OVERLAP),
    },
    4: {
        "TP4, padded heads": layout(4),
        "PP4": layout(pp=4),
        "PP2, VPP2, DP2, overlapped": layout(pp=2, vpp=2, **OVERLAP),
        "DP4, overlapped": layout(**OVERLAP),
        "TP2, PP2": layout(2, 2),
    },
}


@pytest.fixture(scope="session")
def curves(root, tmp_path_factory):
    """curves(jobs, ranks, device): their results, from one launch."""

    def run(jobs: dict[str, dict], ranks: int = 1, device: str = "gpu") -> dict[str, dict]:
        folder = tmp_path_factory.mktemp("curves")
        (folder / "jobs.json").write_text(json.dumps(jobs))
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
        )
        launch = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
            "-m",
            "tests.gpu.curves",
        ]
        command = [sys.executable, *launch, str(folder / "jobs.json"), str(folder / "results.json")]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-6000:]
        return json.loads((folder / "results.json").read_text())

    return run


@pytest.fixture(scope="session")
def on_cpu(curves):
    return curves({"fp32": job(), "fp32, wide": job(**WIDE)}, device="cpu")


@pytest.fixture(scope="session")
def on_one_gpu(curves, tmp_path_factory):
    resume = {"resume": str(tmp_path_factory.mktemp("resumed"))}
    jobs = {"fp32": job(), "fp32, wide": job(**WIDE), "bf16, local": job(dtype="bf16", precision=dict(parts="local"))}
    if find_spec("transformer_engine"):
        jobs["bf16"] = job(dtype="bf16", **resume)
        for name, precision in FORMATS.items():
            folder = {"resume": f"{resume['resume']}/{RESUMED.index(name)}"} if name in RESUMED else {}
            jobs[name] = job(dtype="bf16", precision=precision, **folder)
        jobs["fp8 tensorwise, full recompute"] = job(
            layout(recompute="full"), "bf16", precision=dict(linear="fp8_tensorwise")
        )
    return curves(jobs)


@pytest.fixture(scope="session")
def on_several(curves):
    """Layouts in fp32, TP2 also in bf16 and FP8, by the number of GPUs."""
    found = {}
    for count, layouts in LAYOUTS.items():
        if torch.cuda.device_count() < count:
            continue
        jobs = {name: job(parallel, **WIDE) for name, parallel in layouts.items()}
        if count == 2 and find_spec("transformer_engine"):
            for parallel in ("TP2", "PP2", "DP2, overlapped"):
                for name in ("fp8 delayed", "fp8 tensorwise", "fp8 tensorwise, attention"):
                    jobs[f"{parallel}, {name}"] = job(layouts[parallel], "bf16", FORMATS[name])
        found[count] = curves(jobs, count)
    return found


def check(expected: dict, found: dict, tolerance: float, norms: float = 10) -> None:
    """Losses within the tolerance, gradient norms within some times it."""
    for what, allowed in (("losses", tolerance), ("norms", norms * tolerance)):
        worst = max(abs(a - b) / abs(a) for a, b in zip(expected[what], found[what], strict=True))
        print(f"{what}: {worst:.2e} of {allowed:.0e}")
        assert worst <= allowed, f"{what}: {worst:.2e} apart: {expected[what]} and {found[what]}"


needs_te = pytest.mark.skipif(not find_spec("transformer_engine"), reason="Transformer Engine is not installed")


@pytest.mark.parametrize(("name", "tolerance"), [("fp32", 1e-4), ("fp32, wide", 1e-4), ("bf16, local", 1e-2)])
def test_same_curve_as_the_cpu(name, tolerance, on_cpu, on_one_gpu):
    check(on_cpu.get(name, on_cpu["fp32"]), on_one_gpu[name], tolerance)


@needs_te
def test_transformer_engine_parts_have_the_same_curve(on_cpu, on_one_gpu):
    check(on_cpu["fp32"], on_one_gpu["bf16"], 1e-2)


@needs_te
@pytest.mark.parametrize("name", [*FORMATS, "fp8 tensorwise, full recompute"])
def test_fp8_stays_near_bf16(name, on_one_gpu):
    check(on_one_gpu["bf16"], on_one_gpu[name], 2e-2)


@needs_te
@pytest.mark.parametrize("name", RESUMED)
def test_resuming_is_bit_identical(name, on_one_gpu):
    result = on_one_gpu[name]
    assert result["resumed"] == result["losses"]
    assert result["same_parameters"]


@pytest.mark.parametrize(("count", "name"), [(count, name) for count, names in LAYOUTS.items() for name in names])
def test_every_layout_has_one_gpus_curve(count, name, on_one_gpu, on_several):
    if count not in on_several:
        pytest.skip(f"needs {count} GPUs")
    check(on_one_gpu["fp32, wide"], on_several[count][name], 1e-4)


@needs_te
@pytest.mark.parametrize("parallel", ["TP2", "PP2", "DP2, overlapped"])
@pytest.mark.parametrize("name", ["fp8 delayed", "fp8 tensorwise", "fp8 tensorwise, attention"])
def test_fp8_under_a_layout_has_one_gpus_curve(parallel, name, on_one_gpu, on_several):
    if 2 not in on_several:
        pytest.skip("needs 2 GPUs")
    check(on_one_gpu[name], on_several[2][f"{parallel}, {name}"], 1e-2)
