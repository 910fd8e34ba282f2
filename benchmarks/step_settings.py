"""Training steps of OLMo Hybrid 7B with present and with other settings of norms and gradient averages, in turn, in one process.

python benchmarks/step_settings.py                                    one GPU: 16 of the model's layers
torchrun --nproc-per-node 2 benchmarks/step_settings.py               two: the whole model, TP1 x DP2, FP8 with FP8 parameters
    --only REGEX      formats whose name it finds
    --sequences N     per GPU and step
    --rounds N        how often each setting is timed

The GPU is power-capped, so all settings must meet the same clocks. An engine is built again for each round, because two do not fit.

- present: what the trainer does, with the norms of hybrid_kernels in front of plain linears.
- gradients summed: divided before collectives sum them, instead of averaged in collectives.
- Transformer Engine's norms: in cuDNN, fused into the linears behind them, and in every other place of a norm.
- casts in linears: no kernel hands FP8 tensors to linears. Only in FP8.
- states kept: parallel.keep_delta_rule_states.

To time Transformer Engine's own kernels as well, set NVTE_NORM_FWD_USE_CUDNN=0 and NVTE_NORM_BWD_USE_CUDNN=0 in another call.
"""

import argparse
import re
import statistics
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from train_step import FORMATS, LAYOUTS, SEQUENCE, run_case  # noqa: E402

from testing.gpu_settings import casts_in_linears, transformer_engine_norms  # noqa: E402

CASES = {1: ("TP1", ("bf16", "FP8 tensorwise")), 2: ("TP1 x DP2", ("bf16", "FP8 tensorwise, parameters"))}
SIXTEEN = "GGGA" * 4
GOALS = {"16 layers, TP1, bf16": 26_000, "16 layers, TP1, FP8 tensorwise": 38_000}
"""Least tokens/s per GPU with present settings. Those of the whole model are in train_step.py."""


@contextmanager
def sums():
    """Divide gradients before collectives sum them."""
    from megatron_hybrid.train.optimizers import megatron

    with mock.patch.object(megatron, "averages_exactly", lambda ranks: False):
        yield


SETTINGS = {  # context, fields of `parallel`
    "present": (nullcontext, {}),
    "gradients summed": (sums, {}),
    "Transformer Engine's norms": (transformer_engine_norms, {}),
    "casts in linears": (casts_in_linears, {}),
    "states kept": (nullcontext, {"keep_delta_rule_states": True}),
}


def compare(case: str, model, parallel: dict, precision: dict, groups, args) -> list[dict]:
    """Return the rows of a case: tokens per second per GPU of all settings, medians over the rounds."""
    from kernel_timing import forget
    from report import row

    settings = [name for name in SETTINGS if precision or name != "casts in linears"]
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    for name in (*settings * args.rounds, "present"):
        context, fields = SETTINGS[name]
        with context():
            found = run_case(model, parallel | fields, precision, groups, args)
        seconds[name].append(found["seconds"])
        del found
        forget()
    tokens = args.sequences * SEQUENCE / torch.distributed.get_world_size()
    rates = {name: [tokens / s for s in values] for name, values in seconds.items()}
    if torch.distributed.get_rank() == 0:
        print(case, {name: [round(rate) for rate in values] for name, values in rates.items()}, flush=True)
    present, *others = (statistics.median(values) for values in rates.values())
    ours, goal = row(f"{case}, present", "tokens", "tokens/s per GPU", present), GOALS.get(case)
    return [ours | {"goal": goal, "met": goal and present >= goal}] + [
        row(f"{case}, {name}", "tokens", "tokens/s per GPU", other, present, "present settings", higher_is_better=True)
        for name, other in zip(settings[1:], others, strict=True)
    ]


def main() -> None:
    from kernel_timing import write_gpu

    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.config.presets import olmo_hybrid_7b
    from megatron_hybrid.distributed.process_groups import leave_groups, stop_distributed
    from megatron_hybrid.launch.environment import Launch
    from megatron_hybrid.launch.start import start_distributed

    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="formats whose name this regular expression finds")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=4, help="per GPU and step")
    parser.add_argument("--steps", type=int, default=3)
    given, _ = parser.parse_known_args()
    launch = Launch.from_environment()
    layout, formats = CASES[launch.world_size]
    model = olmo_hybrid_7b()
    if launch.world_size == 1:
        model = model.model_copy(update={"layer_pattern": SIXTEEN})
    parallel = LAYOUTS[launch.world_size][layout]
    args = SimpleNamespace(
        sequences=given.sequences * launch.world_size, micro=1, recompute="none", steps=given.steps, profile=False,
        rounds=given.rounds,
    )  # fmt: skip
    groups = start_distributed(launch, ParallelConfig(**parallel), seed=0)
    rows: list[dict] = []
    for name in formats:
        if re.search(given.only, name):
            case = f"{'16 layers' if launch.world_size == 1 else 'whole'}, {layout}, {name}"
            rows += compare(case, model, parallel, FORMATS[name], groups, args)
            if launch.rank == 0:
                write_gpu("step_settings" if launch.world_size == 1 else f"step_settings_x{launch.world_size}", rows)
    leave_groups()
    stop_distributed()


if __name__ == "__main__":
    main()
