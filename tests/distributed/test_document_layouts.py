"""Training on documents has one curve under every layout: losses, gradient norms and parameters equal those of one rank.

benchmarks/document_layouts.py compares many more layouts.
"""

import numpy as np
import pytest

from testing import jobs
from testing.document_layouts import LAYOUTS, TOLERANCES, curve, differences, one_rank_of
from testing.documents import relative_error
from testing.layouts import LR
from testing.models import SMALLEST
from tests.data.files import write_indexed

QUICK = (
    "TP2 x CP2, mask, micro-batch 2",
    "CP4, pack, micro-batch 1",
    "PP2, VPP2, pack, micro-batch 1",
    "CP2, full recompute, mask, micro-batch 2",
    "DP2, pack, micro-batch 1",
    "ZeRO 2, TP2, mask, micro-batch 2",
)


@pytest.fixture(scope="module")
def expected(ranks):
    """Return the curve of one rank, by the name of the case that it belongs to."""
    known = {}

    def of(name: str) -> dict:
        key = one_rank_of(name)
        if key not in known:
            (known[key],) = curve(ranks, key)
        return known[key]

    return of


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n in QUICK])
def test_layout(name, ranks, expected):
    for what, difference in differences(curve(ranks, name), expected(name)).items():
        assert difference < TOLERANCES[what], f"{what} differ by {difference:.1e}"


def test_documents_and_updates_change_the_curve(ranks, expected):
    """The comparison would find documents that are ignored, and updates that are wrong by a hundredth."""
    name = QUICK[1]
    for change in ({"documents": None}, {"lr": 1.01 * LR}):
        found = differences(curve(ranks, one_rank_of(name), **change), expected(name))
        assert all(difference > 3 * TOLERANCES[what] for what, difference in found.items()), (change, found)


@pytest.mark.parametrize("mode", ["mask", "pack"])
def test_the_trainer_trains_on_documents(mode, ranks, tmp_path):
    """From files to updates, with evaluation: two context parallel ranks end with the parameters of one rank."""
    random = np.random.default_rng(0)
    documents = [[*random.integers(1, 60, random.integers(0, 40)).tolist(), 0] for _ in range(300)]
    data = dict(train=[dict(path=write_indexed(tmp_path / "corpus", documents))], sequence_length=32, documents=mode)
    train = dict(steps=3, global_batch_size=4, micro_batch_size=2, dtype="fp32", optimizer=dict(lr=1e-2, eps=1e-2))
    found = []
    for size in (1, 2):
        config = dict(
            run_dir=str(tmp_path / f"run-{size}"),
            model=SMALLEST | dict(num_attention_heads=4),
            data=data | dict(validation=data["train"], instance_filter={}),
            train=train | dict(eval_interval=2, eval_batches=1),
            parallel=dict(context_parallel_size=size),
            checkpoint=dict(interval=None),
            logging=dict(plot_interval=0, tensorboard=False),
        )
        found.append(ranks.run(jobs.pretrain_run, size, config=config)[0]["parameters"])
    one, two = found
    assert max(relative_error(two[name], value) for name, value in one.items()) < TOLERANCES["tensors"]
