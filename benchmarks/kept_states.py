"""gated_delta_rule with its states kept for the backward pass, and computed again, in one process.

python benchmarks/kept_states.py
"""

import torch
from delta_rule_before_after import inputs_of
from kernel_timing import gpu_ms, kernels, write_gpu
from report import bounded, row

from hybrid_kernels.gated_delta_rule import gated_delta_rule

CASES = {  # batch, length, heads, K, V, and the goal in ms of both passes
    "96/192, 30 heads": ((1, 8192, 30, 96, 192), 0.62),
    "96/192, 30 heads, 4 sequences": ((4, 8192, 30, 96, 192), 2.2),
    "96/192, 15 heads": ((1, 8192, 15, 96, 192), None),
    "128/128, 32 heads": ((1, 8192, 32, 128, 128), 1.0),
    "128/128, 32 heads, 4 sequences": ((4, 8192, 32, 128, 128), None),
}


def times(inputs: list[torch.Tensor], save: str) -> dict[str, float]:
    do = torch.ones_like(inputs[2])

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(gated_delta_rule(*inputs, save=save, backend="cuda")[0], inputs, do)

    us = sum(us for _, us in kernels(both).values())
    return {"forward + backward": gpu_ms(both), "forward + backward, sum of the kernels": us / 1e3}


def main() -> None:
    rows: list[dict] = []
    for name, (shape, goal) in CASES.items():
        inputs = inputs_of(*shape)
        kept, again = (times(inputs, save) for save in ("states", "scores"))
        for metric, ms in kept.items():
            rows.append(row(name, metric, "ms", ms, again[metric], "states computed again"))
        if goal:
            for case, found in (("kept", kept), ("computed again", again)):
                rows.append(
                    bounded(f"{name}, states {case}", "forward + backward", "ms", found["forward + backward"], goal)
                )
        write_gpu("kept_states", rows)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
