"""Our norms in layers on Transformer Engine next to its own: curves, gradients, and checkpoints across."""

from collections.abc import Iterable
from importlib.util import find_spec

import pytest
import torch

from testing import gpu_jobs as jobs

pytestmark = pytest.mark.skipif(not find_spec("transformer_engine"), reason="Transformer Engine is not installed")
FORMATS = {"bf16": {}} | {name: jobs.FORMATS[name] for name in ("fp8 tensorwise", "fp8 blockwise")}
BLOCKS = {"": {}, jobs.SUITE: jobs.SMALL}
"""Layers with pre-norms and with post-norms, and blocks with both."""
CASES = [f"{name}{more}" for name in FORMATS for more in BLOCKS]
THEIRS = dict(setting="Transformer Engine's norms")
NOISE = 1.2
"""Times as far from fp32 as Transformer Engine's norms are."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("norms")


@pytest.fixture(scope="module")
def found(folder):
    """Results by case and norms. Every run saves halfway; the other norms rewrite its checkpoint, and go on from it."""
    todo = {
        f"fp32{more}": jobs.job(**blocks, gradients=str(folder / f"fp32{more}.pt")) for more, blocks in BLOCKS.items()
    }
    for name, precision in FORMATS.items():
        for more, blocks in BLOCKS.items():
            for norms, mine, others in (("ours", {}, THEIRS), ("theirs", THEIRS, dict(setting=None))):
                case = f"{name}{more}, {norms}"
                files = dict(resume=str(folder / case), gradients=str(folder / f"{case}.pt"))
                todo[case] = jobs.job(
                    dtype="bf16", precision=precision, other=others, rewritten=others, **mine, **files, **blocks
                )
    return jobs.side_by_side(todo, 7)


def gradients(folder, case: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{case}.pt", weights_only=True)


def blocks_of(name: str) -> str:
    """Return the key in BLOCKS of a case."""
    return next(more for more in reversed(BLOCKS) if name.endswith(more))


def mean_difference(expected: list[float], found: list[float]) -> float:
    """Return the mean relative difference of two curves. In FP8 a single gradient norm may be a fifth off, with either norm."""
    return sum(abs(a - b) / abs(a) for a, b in zip(expected, found, strict=True)) / len(expected)


def error(found: dict[str, torch.Tensor], oracle: dict[str, torch.Tensor], names: Iterable[str]) -> float:
    """Return the relative error of some gradients, taken as one vector."""
    pairs = [(found[name] - oracle[name], oracle[name]) for name in names]
    wrong, exact = (sum(float(x.square().sum()) for x in some) for some in zip(*pairs, strict=True))
    return (wrong / exact) ** 0.5


@pytest.mark.parametrize("name", CASES)
def test_curves_agree(name, found):
    ours, theirs = found[f"{name}, ours"], found[f"{name}, theirs"]
    assert ours["losses"] != theirs["losses"], "both ran the same norms"
    tolerance = 5e-3 if name.startswith("bf16") else 1e-2
    assert jobs.difference(theirs, ours, "losses") <= tolerance, (theirs["losses"], ours["losses"])
    oracle = found[f"fp32{blocks_of(name)}"]
    mine, other = (mean_difference(oracle["norms"], one["norms"]) for one in (ours, theirs))
    assert mine <= max(5 * tolerance, 1.5 * other), f"gradient norms: {mine} and {other} away from fp32"


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_as_near_to_fp32(name, found, folder):
    oracle = gradients(folder, f"fp32{blocks_of(name)}")
    ours, theirs = (gradients(folder, f"{name}, {norms}") for norms in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() == oracle.keys()
    assert error(ours, oracle, oracle) <= NOISE * error(theirs, oracle, oracle)
    for one in oracle:
        mine, other = error(ours, oracle, [one]), error(theirs, oracle, [one])
        assert mine <= 3 * other + 1e-2, f"{one}: {mine} and {other} away from fp32"


@pytest.mark.parametrize("norms", ["ours", "theirs"])
@pytest.mark.parametrize("name", CASES)
def test_the_other_norms_read_the_checkpoint(name, norms, found):
    run = found[f"{name}, {norms}"]
    assert run["different"] == []
    tolerance = 5e-3 if name.startswith("bf16") else 1e-2
    assert jobs.difference(run, {"losses": run["otherwise"]}, "losses") <= tolerance
