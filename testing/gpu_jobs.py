"""Training jobs by name, to be compared: in fp32 on the CPU, in every format on one GPU, by layout on several GPUs.

benchmarks/gpu_parity.py records what tests/gpu/test_training.py checks.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import torch

from testing.models import small
from testing.parallel import OVERLAP, layout
from testing.shared_gpu import run_ranks

ROOT = Path(__file__).resolve().parent.parent
MODEL = dict(
    layer_pattern="GGGA",
    hidden_size=256,
    ffn_hidden_size=512,
    vocab_size=257,
    num_attention_heads=2,
    gdn=dict(num_key_heads=6, num_value_heads=6, key_head_dim=96, value_head_dim=192),
)
STEPS = 10
LIMIT_S = 900
"""Seconds of one launch; after curves.STUCK_S in one job it says where it is."""


def training(dtype: str, offloaded: float = 0.0) -> dict:
    adam = dict(eps=1e-2, offload_fraction=offloaded)
    return dict(steps=STEPS, global_batch_size=8, micro_batch_size=1, dtype=dtype, optimizer=adam)


def job(parallel: dict | None = None, dtype: str = "fp32", precision: dict | None = None, **more) -> dict:
    return (
        dict(
            model=MODEL | more.pop("model", {}),
            parallel=parallel or {},
            train=training(dtype, more.pop("offloaded", 0.0)),
            precision=precision or {},
            steps=STEPS,
            sequence_length=256,
        )
        | more
    )


FORMATS = {
    "fp8 delayed": dict(fp8_recipe="delayed"),
    "fp8 tensorwise": dict(fp8_recipe="tensorwise"),
    "fp8 blockwise": dict(fp8_recipe="blockwise"),
    "fp8 delayed, attention": dict(fp8_recipe="delayed", fp8_attention=True),
    "fp8 tensorwise, attention": dict(fp8_recipe="tensorwise", fp8_attention=True),
    "fp8 tensorwise, ends in bf16": dict(
        fp8_recipe="tensorwise", num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=1
    ),
}
HELD = {f"{name}, parameters": name for name in FORMATS}  # a format with weights in FP8 alone -> without
FORMATS |= {held: FORMATS[name] | dict(fp8_param_gather=True) for held, name in HELD.items()}
RESUMED = [
    "bf16",
    "fp8 delayed, attention",
    "fp8 tensorwise, attention",
    "fp8 delayed, parameters",
    "fp8 tensorwise, parameters",
    "fp8 blockwise, parameters",
]
SKIPPED = {"skipped, fp8 delayed, parameters": "skipped, fp8 delayed"}
"""As HELD, with two updates that are not made, the last before a save among them."""
OFFLOADED = {
    f"{base}, {share:.0%} on the host": (base, share)
    for base in ("fp32", "bf16, local", "bf16", "fp8 tensorwise")
    for share in (0.5, 1.0)
}
"""A share of the optimizer's state in host memory -> the run without, and the share."""
WIDE = dict(model=dict(num_attention_heads=4))  # so that four ranks have heads; 6 Gated DeltaNet heads are padded to 8
DEEP = dict(model=WIDE["model"] | dict(layer_pattern="GGGA*2"))  # a layer for each of eight virtual stages
LAYOUTS = {
    2: {
        "TP2": layout(2),
        "TP2, no sequence parallelism": layout(2, sequence_parallel=False),
        "PP2": layout(pp=2),
        "PP2, VPP2": layout(pp=2, vpp=2),
        "PP2, VPP2, exchanges waited for": layout(pp=2, vpp=2, overlap_p2p_comm=False),
        "DP2, overlapped": layout(**OVERLAP),
        "CP2": layout(cp=2),
    },
    4: {
        "TP4, padded heads": layout(4),
        "PP4": layout(pp=4),
        "PP4, VPP2": layout(pp=4, vpp=2),
        "PP2, VPP2, DP2, overlapped": layout(pp=2, vpp=2, **OVERLAP),
        "DP4, overlapped": layout(**OVERLAP),
        "TP2, PP2": layout(2, 2),
        "CP4": layout(cp=4),
        "CP2, TP2": layout(2, cp=2),
    },
    8: {
        "TP8, padded heads": layout(8),
        "PP4, VPP2, DP2, overlapped": layout(pp=4, vpp=2, **OVERLAP),
        "DP8, overlapped": layout(**OVERLAP),
        "TP2, PP2, DP2": layout(2, 2),
        "TP2, PP2, VPP2, DP2, overlapped": layout(2, 2, 2, **OVERLAP),
        "CP8": layout(cp=8),
        "CP4, TP2": layout(2, cp=4),
        "CP2, TP2, PP2": layout(2, 2, cp=2),
    },
}
LAUNCHES = {2: 3, 4: 2, 8: 1}
"""Launches of that many ranks that run at once, on the same GPUs."""
HALF = ", 50% on the host"
OFFLOADED_LAYOUTS = {2: ("TP2", "DP2, overlapped"), 4: ("PP2, VPP2, DP2, overlapped",), 8: ()}
DOCUMENT_LAYOUTS = {
    2: ("TP2", "PP2, VPP2", "DP2, overlapped", "CP2"),
    4: ("CP4", "CP2, TP2"),
    8: ("CP8", "CP4, TP2"),
}
DOCUMENT_FORMATS = ("fp8 delayed", "fp8 tensorwise", "fp8 blockwise")
"""Formats in which documents and the small suite's blocks are trained. Attention in FP8 does not take documents."""
FP8_LAYOUTS = {
    2: ("TP2", "PP2", "DP2, overlapped", "CP2"),
    4: (),
    8: ("TP2, PP2, DP2", "TP2, PP2, VPP2, DP2, overlapped", "CP4, TP2"),
}
DEEP_LAYOUTS = ("PP4, VPP2", "PP4, VPP2, DP2, overlapped")
OVERLAPPED = {  # name: (parallel, precision), at TP2
    "bf16": ({}, {}),
    "fp8 delayed": ({}, FORMATS["fp8 delayed"]),
    "fp8 tensorwise": ({}, FORMATS["fp8 tensorwise"]),
    "fp8 tensorwise, ends in bf16": ({}, FORMATS["fp8 tensorwise, ends in bf16"]),
    "bf16, selective recompute": (dict(recompute_granularity="selective"), {}),
    "bf16, full recompute": (dict(recompute_granularity="full"), {}),
}
FP8_FORMATS = (
    "fp8 delayed",
    "fp8 tensorwise",
    "fp8 tensorwise, attention",
    "fp8 delayed, parameters",
    "fp8 tensorwise, parameters",
)


YARN = dict(model=dict(rope_scaling=dict(factor=8.0, original_max_position_embeddings=32)))
SMALL = dict(model=small("GGA", 256, 2, 1, 128, vocab_size=257, init_std=0.06), lr=1e-3)
"""Blocks of AI2's small suite, at a rate at which rounding does not grow (testing/layouts.py)."""
SUITE = ", small suite"
PACKED = dict(documents="pack")
DOCUMENTS = ", documents"
IN_FP32 = {
    "fp32": job(),
    "fp32, wide": job(**WIDE),
    "fp32, deep": job(**DEEP),
    "fp32, YaRN": job(**YARN),
    f"fp32{SUITE}": job(**SMALL),
    f"fp32{DOCUMENTS}": job(**PACKED),
    f"fp32, wide{DOCUMENTS}": job(**WIDE, **PACKED),
}


def curves(jobs: dict[str, dict], ranks: int = 1, device: str = "gpu", gpus: Sequence[int] = ()) -> dict[str, dict]:
    """Results of the jobs (testing/gpu_curves.py), from one launch of that many ranks, on those GPUs if they are named.

    The ranks share the first GPU if there are fewer GPUs than ranks.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "jobs.json").write_text(json.dumps(jobs))
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if gpus or device == "cpu" else {}
        # many run at once: threads of all cores in each would only wait
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | visible
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        )
        command = ["-m", "testing.gpu_curves", str(folder / "jobs.json"), str(folder / "results.json")]
        if device == "gpu" and shared(ranks, gpus):
            status, said = run_ranks([sys.executable, *command], ranks, environment, folder, LIMIT_S)
        else:
            status, said = _run_under_torchrun(command, ranks, environment)
        results = folder / "results.json"
        found = json.loads(results.read_text()) if results.exists() else {}
        if status:
            missing = ", ".join(name for name in jobs if name not in found)
            raise RuntimeError(f"{ranks} ranks ended with status {status}, without: {missing}\n{said[-6000:]}")
        return found


def shared(ranks: int, gpus: Sequence[int] = ()) -> bool:
    """Return whether that many ranks must share a GPU."""
    return ranks > (len(gpus) or torch.cuda.device_count())


def _run_under_torchrun(command: Sequence[str], ranks: int, environment: dict[str, str]) -> tuple[int, str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    process = subprocess.Popen(
        [sys.executable, *launch, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, said = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        _, said = process.communicate()
    return process.returncode, said


def side_by_side(
    jobs: dict[str, dict], launches: int, ranks: int = 1, device: str = "gpu", gpus: Sequence[int] = ()
) -> dict[str, dict]:
    """Jobs shared out over launches that run at once, those of one rank on a GPU each: these models are small, and most of the
    time is start-up.
    """
    names = list(jobs)
    shares = [{name: jobs[name] for name in names[first::launches]} for first in range(launches)]

    def run(number: int) -> dict[str, dict]:
        mine = gpus if ranks > 1 else gpus and [gpus[number % len(gpus)]]
        return curves(shares[number], ranks, device, mine)

    with ThreadPoolExecutor(launches) as pool:
        results = list(pool.map(run, [number for number, share in enumerate(shares) if share]))
    return {name: found for result in results for name, found in result.items()}


def on_cpu() -> dict[str, dict]:
    """The oracle."""
    return side_by_side(IN_FP32, len(IN_FP32), device="cpu")


def on_one_gpu(folder: Path, gpus: Sequence[int] = (), names: Collection[str] = ()) -> dict[str, dict]:
    """Every format, or these `names`, some of them also saved in `folder` and resumed; each job on one of `gpus`."""
    jobs = IN_FP32 | {"bf16, local": job(dtype="bf16", model=dict(backend="local"))}
    if find_spec("transformer_engine"):
        for name, precision in {"bf16": {}, **FORMATS}.items():
            jobs[name] = job(dtype="bf16", precision=precision, **_resumed(name, folder))
        for name in chain(*SKIPPED.items()):
            fmt, two = name.removeprefix("skipped, "), [STEPS // 2 - 2, STEPS // 2 - 1]
            jobs[name] = job(dtype="bf16", precision=FORMATS[fmt], skipped=two, **_resumed(fmt, folder / "skipped"))
        recompute = layout(recompute_granularity="full")
        for name in ("fp8 tensorwise", "fp8 tensorwise, attention"):
            jobs[f"{name}, full recompute"] = job(recompute, "bf16", FORMATS[name])
        jobs["bf16, selective recompute"] = job(layout(recompute_granularity="selective"), "bf16")
        jobs["bf16, YaRN"] = job(dtype="bf16", **YARN)
        for name in ("bf16", *DOCUMENT_FORMATS):
            jobs[f"{name}{SUITE}"] = job(dtype="bf16", precision=FORMATS.get(name, {}), **SMALL)
        for name in ("bf16", *DOCUMENT_FORMATS):
            jobs[f"{name}{DOCUMENTS}"] = job(dtype="bf16", precision=FORMATS.get(name, {}), **PACKED)
    for name, (base, share) in OFFLOADED.items():
        if base in jobs:
            jobs[name] = offloaded(jobs[base], share, folder / name.replace(" ", "_"))
    if names:
        jobs = {name: one for name, one in jobs.items() if name in names}
    return side_by_side(jobs, 4 * max(1, len(gpus)), gpus=gpus)


def offloaded(base: dict, share: float, folder: Path) -> dict:
    """A job with that share of its optimizer's state in host memory: resumed, also without, and with a gradient that is no number."""
    dtype = base["train"]["dtype"]
    more = {"resume": str(folder), "other": {"train": training(dtype)}, "poisoned": True}
    return base | {"train": training(dtype, share)} | more


def _resumed(name: str, folder: Path) -> dict:
    """Return the arguments with which a format is resumed. FP8 parameters are also resumed without them."""
    if name not in RESUMED:
        return {}
    other = {"other": {"precision": FORMATS[HELD[name]]}} if name in HELD else {}
    return {"resume": str(folder / name.replace(" ", "_"))} | other


def on_several(count: int, gpus: Sequence[int] = (), only: str = "") -> dict[str, dict]:
    """Results of `layout_jobs`. Ranks share a GPU if there are too few."""
    with tempfile.TemporaryDirectory() as folder:
        launches = 1 if shared(count, gpus) else LAUNCHES[count]
        return side_by_side(layout_jobs(count, Path(folder), only), launches, count, gpus=gpus)


def layout_jobs(count: int, folder: Path, only: str = "") -> dict[str, dict]:
    """Layouts of that many ranks in fp32, some also in FP8; of these, those whose name `only`, a pattern, finds."""
    jobs = {
        name: job(parallel, **(DEEP if name in DEEP_LAYOUTS else WIDE)) for name, parallel in LAYOUTS[count].items()
    }
    jobs |= {f"{name}{DOCUMENTS}": job(LAYOUTS[count][name], **WIDE, **PACKED) for name in DOCUMENT_LAYOUTS[count]}
    jobs |= {f"{name}{HALF}": job(LAYOUTS[count][name], offloaded=0.5, **WIDE) for name in OFFLOADED_LAYOUTS[count]}
    for name in FP8_LAYOUTS[count] if find_spec("transformer_engine") else ():
        for fmt in fp8_formats(count):
            more = _resumed(fmt, folder / name.replace(" ", "_")) if fmt in HELD else {}
            jobs[f"{name}, {fmt}"] = job(LAYOUTS[count][name], "bf16", FORMATS[fmt], **more)
    return {name: one for name, one in jobs.items() if re.search(only, name)}


def fp8_formats(count: int) -> tuple[str, ...]:
    """Return the formats in which layouts of that many ranks are trained."""
    return FP8_FORMATS if count == 2 else ("fp8 delayed", "fp8 tensorwise")


def one_gpu_of(name: str) -> str:
    """Return the job on one GPU that a layout's job is compared with: the format's, or the fp32 model's, on the same data."""
    if name.endswith(DOCUMENTS):
        return f"fp32, wide{DOCUMENTS}"
    fmt = next((f for f in sorted(FP8_FORMATS, key=len, reverse=True) if name.endswith(f)), None)
    return fmt or ("fp32, deep" if name in DEEP_LAYOUTS else "fp32, wide")


def overlapped(gpus: Sequence[int] = ()) -> dict[str, tuple[dict, dict]]:
    """TP2 on two GPUs, by name: without parallel.tp_comm_overlap, and with it."""
    pairs = {}
    for name, (parallel, precision) in OVERLAPPED.items():
        pairs[f"{name}, plain"] = job(layout(2, **parallel), "bf16", precision)
        pairs[f"{name}, overlapped"] = job(layout(2, tp_comm_overlap=True, **parallel), "bf16", precision)
    found = curves(pairs, 2, gpus=gpus)
    return {name: (found[f"{name}, plain"], found[f"{name}, overlapped"]) for name in OVERLAPPED}


def difference(expected: dict, found: dict, what: str) -> float:
    """Largest relative difference of two curves: `losses` or `norms`."""
    return max(abs(a - b) / abs(a) for a, b in zip(expected[what], found[what], strict=True))


def same_bits(name: str) -> bool:
    """Return whether two runs of a job have the same bits. In fp32 they do not: torch's attention uses atomic additions."""
    return not name.startswith("fp32")
