"""Training jobs with and without CUDA graphs, which must have the same bits."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from testing.gpu_jobs import PACKED, SMALL, SUITE, WIDE, curves, job, layout, training

STEPS = 20
GRAPHS = dict(cuda_graph_impl="full_iteration", cuda_graph_warmup_steps=3)
KDA = dict(layer_pattern="KKKA", kda=dict(num_heads=2, key_head_dim=128, value_head_dim=128))


def case(parallel: dict | None = None, micro_batch_size: int = 8, **more: Any) -> dict:
    """Return the arguments of a job in bf16. One micro-batch, unless its size is given."""
    train = training("bf16") | dict(steps=STEPS, micro_batch_size=micro_batch_size)
    return job(parallel, "bf16", train=train, **more) | dict(steps=STEPS)


ONE_GPU = {
    "hybrid": case(),
    "hybrid, two micro-batches": case(micro_batch_size=4),
    "transformer": case(model=dict(layer_pattern="AAAA")),
    "transformer, two micro-batches": case(model=dict(layer_pattern="AAAA"), micro_batch_size=4),
    "Kimi Delta Attention": case(model=KDA),
    SUITE.removeprefix(", "): case(**SMALL),
    "documents": case(**PACKED),
    "documents, two micro-batches": case(micro_batch_size=4, **PACKED),
    "documents, masked": case(documents="mask"),
    "local backend": case(model=dict(backend="local", layer_pattern="GGGG")),
    "plain optimizer": case(layout(distributed_optimizer=False)),
    "selective recompute": case(layout(recompute_granularity="selective")),
    "full recompute": case(layout(recompute_granularity="full")),
    "two skipped updates": case(skipped=[4, 9]),
}
TWO_GPUS = {
    "DP2": case(micro_batch_size=4),
    "DP2, two micro-batches": case(micro_batch_size=2),
    "DP2, documents": case(micro_batch_size=4, **PACKED),
    "DP2, plain optimizer": case(layout(distributed_optimizer=False), micro_batch_size=4),
    "TP2": case(layout(2), **WIDE),
    "TP2, no sequence parallelism": case(layout(2, sequence_parallel=False), **WIDE),
    "CP2": case(layout(cp=2), **WIDE),
}
RESUMED = "hybrid"


def pairs(cases: dict[str, dict], ranks: int, folder: Path) -> dict[str, tuple[dict, dict]]:
    """Return the results of each case without graphs and with them. One is also saved and resumed with graphs.

    Both runs of a case are in one process, because fla's kernels are tuned once per process.
    """
    names, launches = list(cases), 4 if ranks == 1 else 2

    def run(number: int) -> dict[str, dict]:
        todo = {}
        for name in names[number::launches]:
            todo[name] = cases[name]
            todo[_graphed(name)] = cases[name] | {"train": cases[name]["train"] | GRAPHS}
            if name == RESUMED:
                todo[_graphed(name)] |= {"resume": str(folder)}
        return curves(todo, ranks) if todo else {}

    with ThreadPoolExecutor(launches) as pool:
        found = {name: one for results in pool.map(run, range(launches)) for name, one in results.items()}
    return {name: (found[name], found[_graphed(name)]) for name in names}


def _graphed(name: str) -> str:
    return f"{name}, graphs"
