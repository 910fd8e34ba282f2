"""Train the ladder of a scaling law: one run per size and architecture, with an endpoint per token budget, several runs per GPU.

Every run is a WSD-S schedule: the learning rate falls to 0 over the last 5% of the steps before each endpoint, where the model is
evaluated, and returns to its peak. All architectures of a size read the same tokens in the same order. fit.py reads the endpoints from
`points.json` in the folder of each run.

To resume, call it again: finished runs stay, and the others continue from their newest checkpoint. Larger budgets extend finished
runs. SIGTERM and Ctrl-C stop all runs with a checkpoint. Exit codes: 0 all runs are finished; 75 stopped before; 1 a run failed;
78 wrong arguments.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), str(HERE.parent), str(HERE)]

from concurrent_runs import Run, train_all  # noqa: E402
from points import Point, read_endpoints, write_points  # noqa: E402
from shapes import (  # noqa: E402
    ARCHITECTURES,
    DECAY,
    KEY_HEAD_DIM,
    SIZES,
    Plan,
    Size,
    body_parameters,
    make_model,
    make_plan,
    training_flops,
)

from megatron_hybrid.arch.model import ModelConfig  # noqa: E402
from megatron_hybrid.base.errors import REQUEUE, UserError, no_traceback  # noqa: E402
from megatron_hybrid.base.numbers import positive  # noqa: E402
from megatron_hybrid.config.command_line import CommandLine  # noqa: E402
from megatron_hybrid.config.load import load_run  # noqa: E402
from megatron_hybrid.data.errors import DataError  # noqa: E402
from megatron_hybrid.data.summary import StatedData, read_summary  # noqa: E402

BASE = HERE / "base.yaml"
BUDGETS = (0.5, 1.0, 2.0)


@dataclass(frozen=True, eq=False)
class LadderRun(Run):
    """The run of a size and an architecture. `model` is the architecture."""

    size: Size
    plan: Plan
    budgets: tuple[float, ...]
    train_tokens: int | None
    """Tokens of the training data; None: it is not there yet."""

    @cached_property
    def parameters(self) -> int:
        """N, without embeddings and output layer."""
        return body_parameters(self.config.model)

    def tokens_at(self, step: int) -> int:
        """Return the tokens that the run has trained on after a step."""
        return step * self.plan.tokens_per_step

    def flops_at(self, step: int) -> int:
        """Return the FLOPs of training up to a step."""
        return training_flops(self.config.model, self.tokens_at(step), self.plan.sequence_length)

    def epochs_at(self, step: int) -> float | None:
        """Return how often the training data has been read after a step."""
        return self.tokens_at(step) / self.train_tokens if self.train_tokens else None

    def points(self) -> list[Point]:
        """Return the endpoints that have been evaluated."""
        found = read_endpoints(self.folder / "metrics.jsonl", self.plan.endpoints)
        return [
            Point(
                architecture=self.model,
                size=str(self.size),
                budget=budget,
                parameters=self.parameters,
                tokens=self.tokens_at(step),
                flops=self.flops_at(step),
                epochs=self.epochs_at(step),
                **found[step],
            )
            for budget, step in zip(sorted(self.budgets), self.plan.endpoints, strict=True)
            if step in found
        ]


def ladder(
    sizes: Sequence[Size],
    architectures: Sequence[str],
    budgets: tuple[float, ...],
    data: Path,
    runs: Path,
    overrides: Sequence[str] = (),
    key_head_dim: int = KEY_HEAD_DIM,
) -> Iterator[LadderRun]:
    """Yield all runs, the smallest first.

    Args:
        data: folder that corpus.py wrote.
        overrides: fields of all runs. They win over those of the ladder.
        key_head_dim: width of the keys of Gated DeltaNet.

    Raises:
        UserError: budgets, sizes or overrides that do not fit.
    """
    data = data.resolve()
    sources = [f"data.train=[{{path: {data / 'train'}}}]", f"data.tokenizer={data / 'tokenizer'}"]
    sources += [f"data.validation.{name}=[{{path: {data / name}}}]" for name in ("files", "packages")]
    base = load_run(str(BASE), [*sources, *overrides])
    summary = _summary(base.data.train[0].path)
    vocab_size = summary.vocab_size if summary else base.model.vocab_size
    for size, architecture in product(sorted(sizes, key=lambda size: _count(size, vocab_size)), architectures):
        plan = make_plan(_count(size, vocab_size), budgets, base.data.sequence_length)
        folder = runs.resolve() / f"{architecture}-{str(size).replace('/', '-')}"
        model = make_model(size, architecture, vocab_size, key_head_dim)
        own = [f"run_dir={folder}", *sources, *_model_overrides(model), *_plan_overrides(plan)]
        given = (*own, *overrides)
        config = load_run(str(BASE), list(given))
        yield LadderRun(architecture, given, config, BASE, size, plan, budgets, summary.tokens if summary else None)


def _count(size: Size, vocab_size: int) -> int:
    return body_parameters(make_model(size, "transformer", vocab_size))


def _summary(prefix: str) -> StatedData | None:
    try:
        return read_summary(prefix)
    except DataError as error:
        raise UserError(str(error)) from error


def _model_overrides(model: ModelConfig) -> list[str]:
    names = ("layer_pattern", "hidden_size", "ffn_hidden_size", "vocab_size", "num_attention_heads")
    found = [f"model.{name}={getattr(model, name)}" for name in names]
    gdn = model.section("gdn")
    return found + ["model.gdn=null" if gdn is None else f"model.gdn={gdn.model_dump_json()}"]


def _plan_overrides(plan: Plan) -> list[str]:
    *early, last = plan.endpoints
    return [
        f"train.steps={last}",
        f"train.global_batch_size={plan.batch}",
        f"train.micro_batch_size={plan.micro_batch}",
        f"train.optimizer.lr={plan.learning_rate}",
        f"train.schedule.warmup_steps={plan.warmup_steps}",
        f"train.schedule.decay_fraction={DECAY}",
        f"train.schedule.endpoints={early}",
        f"train.eval_interval={last}",
    ]


def describe(runs: Sequence[LadderRun], tflops: float) -> Iterator[str]:
    """Yield a line per run, and the sum: sizes, tokens, FLOPs and hours.

    Args:
        tflops: TFLOP/s of a GPU, over all runs that share it.
    """
    head = f"{'run':<24}{'N':>12}{'FFN':>6}{'batch':>7}{'lr':>9}{'warm-up':>9}  {'steps of the endpoints':<24}"
    yield head + f"{'tokens':>9}{'epochs':>8}{'FLOPs':>10}{'hours':>7}"
    total = 0.0
    for run in runs:
        last = run.plan.endpoints[-1]
        flops, epochs = run.flops_at(last), run.epochs_at(last)
        total += flops
        plan, steps = run.plan, " ".join(map(str, run.plan.endpoints))
        line = f"{run.folder.name:<24}{run.parameters:>12,}{run.config.model.ffn_hidden_size:>6}{plan.batch:>7}"
        line += f"{plan.learning_rate:>9.5f}{plan.warmup_steps:>9}  {steps:<24}{run.tokens_at(last) / 1e6:>8.1f}M"
        yield line + f"{'' if epochs is None else f'{epochs:.1f}':>8}{flops:>10.2e}{_hours(flops, tflops):>7.2f}"
    yield f"{len(runs)} runs, {total:.2e} FLOPs, {_hours(total, tflops):.1f} hours of one GPU at {tflops:g} TFLOP/s"


def _hours(flops: float, tflops: float) -> float:
    return flops / (tflops * 1e12) / 3600


def write_all(runs: Sequence[LadderRun]) -> int:
    """Write points.json of each run that has points. Return their number."""
    count = 0
    for run in runs:
        if found := run.points():
            write_points(run.folder / "points.json", found)
            count += len(found)
    return count


def parser() -> CommandLine:
    found = CommandLine(__doc__)
    add = found.add_argument
    add("--sizes", nargs="+", default=[*map(str, SIZES)], metavar="D/HEADS/LAYERS", help="default: %(default)s")
    add("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    add(
        "--budgets",
        nargs="+",
        type=float,
        default=BUDGETS,
        help="multiples of 20 tokens per parameter (default: 0.5 1 2)",
    )
    add(
        "--key-head-dim",
        type=positive,
        default=KEY_HEAD_DIM,
        help="width of the keys of Gated DeltaNet; its values are twice as wide (default: %(default)s)",
    )
    add(
        "--data",
        type=Path,
        default=ROOT / "data" / "scaling",
        help="folder that corpus.py wrote (default: %(default)s)",
    )
    add("--runs", type=Path, default=ROOT / "runs" / "scaling", help="folder of the runs (default: %(default)s)")
    add("--list", action="store_true", help="print all runs with their parameters, tokens, FLOPs and hours, and stop")
    add("--tflops", type=float, default=100.0, help="with --list: TFLOP/s of a GPU, over all runs on it (default: 100)")
    add("--gpus", type=int, default=0, help="GPUs to use (default: 0, on CPU)")
    add("--runs-per-gpu", type=positive, help="runs side by side on a GPU (default: 4), or on the CPU (default: 1)")
    add("--mps", action="store_true", help="let runs share a GPU at the same time (NVIDIA MPS)")
    add("--time-limit", type=float, default=float("inf"), metavar="S", help="stop after S seconds, with checkpoints")
    add(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="fields of all runs: data.sequence_length=512",
    )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    begin, arguments = time.monotonic(), parser().parse(argv)
    with no_traceback():
        sizes = [Size.parse(text) for text in arguments.sizes]
        budgets = tuple(arguments.budgets)
        runs = list(
            ladder(
                sizes,
                arguments.architectures,
                budgets,
                arguments.data,
                arguments.runs,
                arguments.overrides,
                arguments.key_head_dim,
            )
        )
    if arguments.list:
        print(*describe(runs, arguments.tflops), sep="\n")
        return 0
    per_device = arguments.runs_per_gpu or (4 if arguments.gpus else 1)
    failed = train_all(runs, arguments.gpus, per_device, begin + arguments.time_limit, arguments.mps)
    count = write_all(runs)
    print(f"{count} of {len(runs) * len(budgets)} endpoints are evaluated", flush=True)
    unfinished = sum(not run.is_finished for run in runs)
    return 1 if failed else REQUEUE if unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
