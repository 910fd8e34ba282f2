"""The layouts under which training on documents must have the curve of one rank."""

import tempfile

from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.checkpoint.reader import CheckpointReader
from testing import jobs
from testing.documents import relative_error
from testing.layouts import DEEP, LR, MODEL, SHALLOW, TRAIN, layout, relative_difference
from testing.parallel import OVERLAP

STEPS = 5
TOLERANCES = {"losses": 1e-5, "norms": 1e-5, "tensors": 1e-5}
"""Largest relative differences from one rank; of each tensor of the trained model in the L2 norm."""

RECOMPUTE = dict(recompute_granularity="full"), dict(recompute_granularity="selective")
PARALLEL = {
    # name: (ranks, layout)
    "one rank": (1, layout()),
    "one rank, full recompute": (1, layout(**RECOMPUTE[0])),
    "one rank, selective recompute": (1, layout(**RECOMPUTE[1])),
    "DP2": (2, layout()),
    "DP2, overlapped": (2, layout(**OVERLAP)),
    "TP2": (2, layout(2)),
    "TP2, no sequence parallelism": (2, layout(2, sequence_parallel=False)),
    "TP4, padded heads": (4, layout(4)),
    "PP2": (2, layout(pp=2)),
    "PP2, VPP2": (2, layout(pp=2, vpp=2)),
    "PP4": (4, layout(pp=4)),
    "CP2": (2, layout(cp=2)),
    "CP2, full recompute": (2, layout(cp=2, **RECOMPUTE[0])),
    "CP2, selective recompute": (2, layout(cp=2, **RECOMPUTE[1])),
    "CP4": (4, layout(cp=4)),
    "CP2 x DP2": (4, layout(cp=2)),
    "TP2 x CP2": (4, layout(2, cp=2)),
    "TP2 x CP2, no sequence parallelism": (4, layout(2, cp=2, sequence_parallel=False)),
    "TP2 x CP4": (8, layout(2, cp=4)),
    "PP2 x CP2": (4, layout(pp=2, cp=2)),
    "PP2, VPP2 x CP2": (4, layout(pp=2, vpp=2, cp=2)),
    "PP2 x CP4": (8, layout(pp=2, cp=4)),
    "TP2 x PP2": (4, layout(2, 2)),
    "TP2 x PP2 x CP2": (8, layout(2, 2, cp=2)),
    "TP2 x PP2, VPP2, selective recompute": (4, layout(2, 2, 2, **RECOMPUTE[1])),
    "PP2, VPP2 x DP2, overlapped": (4, layout(pp=2, vpp=2, **OVERLAP)),
}
ZERO = {f"ZeRO {stage}, {name}": (2, layout(tp), stage) for stage in (1, 2, 3) for name, tp in (("DP2", 1), ("TP2", 2))}
TIED = ("one rank", "TP2", "PP2", "CP2", "TP2 x CP2")
"""Layouts that are also run with tied embeddings."""


def _case(ranks: int, parallel: dict, mode: str, size: int, zero: int | None = None, **model) -> dict:
    """Return the arguments of `jobs.curve`, and the number of ranks."""
    train = TRAIN | {"micro_batch_size": size, "engine": "megatron" if zero is None else "deepspeed"}
    more = {} if zero is None else {"zero": {"stage": zero}}
    pattern = DEEP if parallel["pipeline_parallel_size"] * parallel["virtual_pipeline_parallel_size"] > 2 else SHALLOW
    model = MODEL | {"layer_pattern": pattern} | model
    return dict(world_size=ranks, model=model, parallel=parallel, train=train, documents=mode, **more)


def _cases() -> dict[str, dict]:
    found = {}
    for name, (ranks, parallel) in PARALLEL.items():
        for mode, size in (("mask", 2), ("pack", 1)):
            found[f"{name}, {mode}, micro-batch {size}"] = _case(ranks, parallel, mode, size)
    for name, (ranks, parallel, stage) in ZERO.items():
        found[f"{name}, mask, micro-batch 2"] = _case(ranks, parallel, "mask", 2, zero=stage)
    for name in TIED:
        found[f"{name}, tied, pack, micro-batch 2"] = _case(*PARALLEL[name], "pack", 2, tie_embeddings=True)
    for mode, size in (("mask", 2), ("pack", 1)):
        found[f"one rank, deep, {mode}, micro-batch {size}"] = _case(1, layout(), mode, size, layer_pattern=DEEP)
    return found


LAYOUTS = _cases()


def one_rank_of(name: str) -> str:
    """Return the case on one rank, of the same model and data, that a case is compared with."""
    case = LAYOUTS[name]
    return next(
        other
        for other, one in LAYOUTS.items()
        if one["parallel"] == layout() and "zero" not in one and one["world_size"] == 1
        if all(one[field] == case[field] for field in ("model", "documents"))
        if one["train"]["micro_batch_size"] == case["train"]["micro_batch_size"]
    )


def curve(ranks, name: str, **changes) -> list[dict]:
    """Return the curves of all ranks of a case, and the whole tensors of the model after the last step."""
    with tempfile.TemporaryDirectory() as folder:
        found = ranks.run(jobs.curve, **dict(steps=STEPS, lr=LR, save=folder) | LAYOUTS[name] | changes)
        with CheckpointReader(found[0]["path"]) as reader:
            tensors = {name: reader.read(name) for name in model_tensors(reader.model)}
    return [rank | {"tensors": tensors} for rank in found]


def differences(found: list[dict], expected: dict) -> dict[str, float]:
    """Return the largest relative difference of losses, gradient norms and tensors from those of one rank."""
    return {
        "losses": max(relative_difference(rank["losses"], expected["losses"]) for rank in found),
        "norms": max(relative_difference(rank["norms"], expected["norms"]) for rank in found),
        "tensors": max(relative_error(found[0]["tensors"][name], one) for name, one in expected["tensors"].items()),
    }
