"""Steps as graphs, with a tape in place of a CUDA graph: the same bits, and what a graph cannot repeat is found or refused."""

import pytest
import torch

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.train import TrainConfig
from megatron_hybrid.train.cuda_graph import describe, make_recorder
from megatron_hybrid.train.engines.graphed_passes import MOST_GRAPHS, GraphedPasses, _Step
from testing import graph_jobs, jobs
from testing.layouts import MODEL, PERI_NORM, TRAIN, layout
from testing.models import SMALLEST
from testing.op_tape import HostReadError, TapeRecorder
from tests.train.test_trainer import config, metrics  # noqa: F401 - a fixture

STEPS = 5
REPLAYS = 2 * (STEPS - graph_jobs.GRAPHS["cuda_graph_warmup_steps"])
"""Replays of the passes, and of the copy of parameters."""
TRANSFORMER = MODEL | {"layer_pattern": "AA"}
KDA = dict(key_head_dim=8, value_head_dim=8, num_heads=6)
CASES = {  # independent parameters are paired
    # name: (ranks, arguments)
    "hybrid, a skipped update": (1, dict(skipped=(3,))),
    "transformer, plain optimizer": (1, dict(model=TRANSFORMER, parallel=layout(distributed_optimizer=False))),
    "bf16, one micro-batch": (1, dict(train=dict(dtype="bf16", micro_batch_size=8))),
    "Kimi Delta Attention, Muon": (
        1,
        dict(model=MODEL | dict(layer_pattern="KA", kda=KDA), train=dict(optimizer=dict(kind="muon"))),
    ),
    "windows, norms everywhere, tied, full recompute": (
        1,
        dict(model=PERI_NORM | dict(tie_embeddings=True), lr=1e-3, parallel=layout(recompute_granularity="full")),
    ),
    "YaRN, selective recompute": (
        1,
        dict(
            model=MODEL | dict(rope_scaling=dict(factor=8.0, original_max_position_embeddings=32)),
            parallel=layout(recompute_granularity="selective"),
        ),
    ),
    "mask": (1, dict(documents="mask")),
    "pack": (1, dict(documents="pack", train=dict(micro_batch_size=1))),
    "DP2, pack": (2, dict(documents="pack")),
    "DP2, plain optimizer": (2, dict(parallel=layout(distributed_optimizer=False))),
    "TP2": (2, dict(parallel=layout(2))),
    "TP2, no sequence parallelism": (2, dict(parallel=layout(2, sequence_parallel=False))),
    "CP2, mask": (2, dict(parallel=layout(cp=2), documents="mask")),
}


def arguments(more: dict) -> dict:
    return dict(model=MODEL, parallel={}, steps=STEPS) | more | dict(train=TRAIN | more.get("train", {}))


def assert_same(plain: dict, taped: dict) -> None:
    assert taped["losses"] == plain["losses"] and taped["norms"] == plain["norms"]
    assert all(torch.equal(value, taped["parameters"][name]) for name, value in plain["parameters"].items())


@pytest.mark.parametrize("name", CASES)
def test_the_bits_are_those_without_graphs(ranks, name):
    count, more = CASES[name]
    expected = REPLAYS // 2 if name.endswith("plain optimizer") else REPLAYS - ("skipped" in name)
    for plain, taped in ranks.run(graph_jobs.both_curves, count, **arguments(more)):
        assert_same(plain, taped)
        assert plain["replays"] == taped["kept"] == 0
        if name == "DP2, pack":  # every rank has graphs for the numbers of documents that it met
            assert REPLAYS // 2 < taped["replays"] < REPLAYS
        else:
            assert taped["replays"] == expected


def test_a_resumed_run_has_the_same_bits(ranks, tmp_path):
    straight, found = arguments(dict(steps=STEPS + 2)), arguments(dict(train=graph_jobs.GRAPHS))
    plain = ranks.run(jobs.curve, 2, **straight)
    half = ranks.run(graph_jobs.curve, 2, **found | dict(steps=3, save=str(tmp_path)))
    rest = ranks.run(graph_jobs.curve, 2, **found | dict(start=3, steps=STEPS + 2, load=half[0]["path"]))
    for one, first, second in zip(plain, half, rest, strict=True):
        assert_same(one, second | {what: first[what] + second[what] for what in ("losses", "norms")})
        assert first["replays"] == 2 and second["replays"] == 4


def test_a_whole_run_with_ramp_evaluations_and_checkpoints_has_the_same_lines(ranks, config, tmp_path):  # noqa: F811
    config["train"] |= {"steps": 10, "cuda_graph_warmup_steps": 1}
    found = {}
    for name, impl in (("plain", "none"), ("taped", "full_iteration")):
        run = config | {"run_dir": str(tmp_path / name), "train": config["train"] | {"cuda_graph_impl": impl}}
        found[name] = ranks.run(graph_jobs.pretrain_run, 2, config=run)
    for key in ("step", "loss", "z_loss", "grad_norm", "eval_loss", "lr", "batch_size"):
        plain, taped = ([line.get(key) for line in metrics({"run_dir": str(tmp_path / name)})] for name in found)
        assert taped == plain, key
    for one, other in zip(found["plain"], found["taped"], strict=True):
        assert all(torch.equal(value, other["moments"][name]) for name, value in one["moments"].items())
        assert one["tapes"] == 0 and other["tapes"] == 3, "passes of both batch sizes, and the copy of parameters"
    row = (tmp_path / "taped" / "formats.txt").read_text().splitlines()[-1].split("  ")
    assert [x.strip() for x in row if x][-2:] == [
        "CUDA graphs, after 1 steps of each shape",
        "train.cuda_graph_impl = full_iteration",
    ]


def test_evaluations_and_attributions_between_steps_change_nothing(ranks):
    found = dict(model=SMALLEST, train=dict(steps=5, global_batch_size=4, micro_batch_size=2, dtype="fp32"), steps=5)
    (plain,) = ranks.run(graph_jobs.curve_with_evaluations, 1, **found)
    (taped,) = ranks.run(graph_jobs.curve_with_evaluations, 1, **found | {"train": found["train"] | graph_jobs.GRAPHS})
    assert taped["tapes"] == 2 and plain["tapes"] == 0
    for what in ("losses", "norms", "evaluated"):
        assert taped[what] == plain[what], what


def test_inputs_that_are_not_refreshed_are_seen(ranks):
    ((plain, *stale),) = ranks.run(stale_curves, 1)
    for what, losses in zip(("batches", "scale"), stale, strict=True):
        assert losses[:3] == plain[:3] and losses[3:] != plain[3:], what


def stale_curves() -> list[list[float]]:
    """Return the losses of a curve, then of those whose graphs do not receive new batches, or a new scale."""
    load = _Step.load

    def without_batches(step: _Step, mine: list, scale: torch.Tensor | None) -> None:
        if step.passes.replay is None:
            load(step, mine, scale)
        else:
            step.scale.copy_(scale)

    def without_scale(step: _Step, mine: list, scale: torch.Tensor | None) -> None:
        load(step, mine, scale if step.passes.replay is None else None)

    from megatron_hybrid.distributed.process_groups import leave_groups

    found = []
    for function in (load, without_batches, without_scale):
        _Step.load = function
        result = graph_jobs.curve(
            **arguments(dict(documents="pack", train=dict(micro_batch_size=1, **graph_jobs.GRAPHS)))
        )
        found.append(result["losses"])
        leave_groups()
    return found


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.numpy(),
        lambda x: x * torch.tensor([2.0]),
        lambda x: torch.equal(x, x),
    ],
)
def test_a_tape_finds_host_reads(read):
    with pytest.raises(HostReadError):
        TapeRecorder().record(lambda: read(torch.ones(3)))


def test_a_tape_repeats_operations_and_no_python():
    calls, x, y = [], torch.ones(2), torch.zeros(2)

    def accumulate() -> None:
        calls.append(1)
        y.add_((2 * x).view(1, 2)[0])

    replay = TapeRecorder().record(accumulate)
    assert y.tolist() == [0, 0], "recording computes nothing"
    replay()
    x.fill_(5)
    replay()
    assert y.tolist() == [12, 12] and calls == [1]


def test_the_oldest_shapes_are_forgotten():
    passes = GraphedPasses(_NoRunner(), 1, TapeRecorder())
    from megatron_hybrid.data.batch import Batch

    made = []
    for length in [*range(2, 3 + MOST_GRAPHS), 2]:
        batch = Batch.of_samples(torch.zeros(1, length + 1, dtype=torch.int64))
        made.append(passes._step([batch], batch.tokens.shape, None))
    assert len(passes._steps) == MOST_GRAPHS and made[-1] is not made[0]
    assert passes._step([batch], batch.tokens.shape, None) is made[-1]


class _NoRunner:
    chunks = ()


def test_graphs_need_a_gpu():
    common = dict(steps=1, global_batch_size=1)
    assert make_recorder(TrainConfig(**common)) is None
    automatic = TrainConfig(**common, cuda_graph_impl="auto")
    assert make_recorder(automatic) is None
    assert describe(automatic, None) == ("no CUDA graphs", "train.cuda_graph_impl = auto, and there is no GPU")
    asked = TrainConfig(**common, cuda_graph_impl="full_iteration")
    with pytest.raises(
        ConfigError, match=r"train.cuda_graph_impl: full_iteration needs a GPU.*set it to none, or to auto"
    ):
        make_recorder(asked)
    how = ("CUDA graphs, after 3 steps of each shape", "train.cuda_graph_impl = full_iteration")
    assert describe(asked, TapeRecorder()) == how and describe(TrainConfig(**common), None) is None
