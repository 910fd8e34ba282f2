"""Values that are not finite and replicas that differ: named, and never saved."""

import math
from collections.abc import Callable
from typing import Any

from tests.faults import run_state
from tests.faults.processes import Forked

BAD_STEP = 5


def _once(owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a method's result in one call."""
    original, seen = getattr(owner, name), [0]

    def changed(self: Any, *args: Any) -> Any:
        result = original(self, *args)
        seen[0] += 1
        return change(self, result) if seen[0] == BAD_STEP else result

    setattr(owner, name, changed)


def _bad_module(rank: int) -> None:
    from megatron_hybrid.train.trainer import Trainer

    original = Trainer.step

    def step(self: Any) -> Any:
        module = self.engine.chunks[0].decoder.layers[0].mlp.linear_fc2
        if rank == 1 and self.progress.step == BAD_STEP - 1:
            hook = module.register_forward_hook(lambda m, i, o: (o[0] * math.nan, *o[1:]))
            outcome = original(self)
            hook.remove()
            return outcome
        return original(self)

    Trainer.step = step  # type: ignore[method-assign]


def _bad_norm(rank: int) -> None:
    from megatron_hybrid.train.engines.megatron import MegatronEngine

    _once(MegatronEngine, "gradient_norm", lambda self, norm: math.nan)


def _damaged_gradient(value: float) -> Callable[[int], None]:
    def hook(rank: int) -> None:
        from megatron_hybrid.train.engines.megatron import MegatronEngine

        def damage(self: Any, read_losses: Any) -> Any:
            if rank == 1:
                next(iter(self.wrapped[0].buffers)).grad_data.view(-1)[7] = value
            return read_losses

        _once(MegatronEngine, "forward_backward", damage)

    return hook


def _damaged_parameter(rank: int) -> None:
    from megatron_hybrid.train.engines.megatron import MegatronEngine

    def damage(self: Any, result: Any) -> Any:
        if rank == 1:
            next(iter(self.chunks[0].parameters())).data.view(-1)[0] += 1e-3
        return result

    _once(MegatronEngine, "update", damage)


PLAIN = {"parallel.distributed_optimizer": "false"}
CASES: tuple[tuple[str, str, dict[str, str], Callable[[int], None], set[int], str], ...] = (
    ("a module", "DP2", {}, _bad_module, {0}, "reproducible with the same micro-batches: rank 1 on"),
    (
        "a parameter of a replica",
        "DP2",
        PLAIN,
        _damaged_parameter,
        {75},
        "in embedding.word_embeddings.weight (the first",
    ),
    (
        "a gradient, infinite",
        "DP2",
        PLAIN,
        _damaged_gradient(math.inf),
        {0},
        "not reproducible: the same micro-batches",
    ),
    ("a gradient, finite", "DP2", PLAIN, _damaged_gradient(5.0), {75}, "gradient norm"),
    ("a module", "PP2", {}, _bad_module, {0}, "reproducible with the same micro-batches"),
    ("the norm", "one rank", {}, _bad_norm, {0}, "not reproducible: the same micro-batches"),
)
"""What is damaged, layout, fields, the fault, expected exit statuses, and what is printed."""


def run(part: Any, count: int) -> None:
    """Run the first `count` cases."""
    for number, (what, layout, fields, hook, statuses, says) in enumerate(CASES[:count]):
        run_dir = part.folder / str(number)
        arguments = run_state.arguments(part.folder, run_dir, layout, 12, BAD_STEP, **fields)
        ranks = Forked(arguments, run_state.LAYOUTS[layout][0], part.folder / "log", hook)
        codes = ranks.wait(60)
        name, text = f"{what} damaged, {layout}", ranks.text()
        part.expect(set(codes) == statuses, f"{name}: {codes} {text[-500:]}")
        part.expect(says in text, f"{name}: not reported: {text[-500:]}")
        if statuses != {0}:
            part.expect(run_state.saved_step(run_dir) == 0, f"{name}: ranks that differ were saved")
