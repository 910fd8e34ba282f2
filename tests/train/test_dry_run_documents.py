"""Documents in `--dry-run`: from an earlier packing, from indexes, or assumed, compared with what training counts."""

import subprocess
import sys

import numpy as np
import pytest

from megatron_hybrid.arch.documents import assumed_attended_length
from megatron_hybrid.arch.flops import training_flops_per_token
from megatron_hybrid.config.describe import describe
from megatron_hybrid.config.load import load_run
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.attended_length import blend_attended_length
from megatron_hybrid.data.build import build_train_and_validation, open_sources
from megatron_hybrid.data.prepare_documents import DocumentPreparation, prepare_alone
from megatron_hybrid.train.dry_run_documents import look_at_documents
from tests.config.wrong_runs import TINY
from tests.data.document_files import EOS, random_documents, write_corpus

LENGTH = 32


def run_with(tmp_path, mode: str) -> RunConfig:
    if not (tmp_path / "data").exists():
        write_corpus(tmp_path / "data", random_documents(np.random.default_rng(0), 600, 50), "index")
    overrides = [f"run_dir={tmp_path}/run", f"data.train=[{{path: {tmp_path}/data/corpus}}]", "data.validation=[]"]
    run = load_run(None, [*TINY, *overrides, f"data.sequence_length={LENGTH}", "model.vocab_size=60000"])
    return run.model_copy(update={"data": run.data.model_copy(update={"documents": mode})})


def blend_of(run: RunConfig):
    opened = open_sources(run.data, run.model.vocab_size)
    documents = prepare_alone(DocumentPreparation(opened, run.data, EOS, run.run_dir))
    return build_train_and_validation(run.data, run.model.vocab_size, documents=documents)[0]


def attended_by_hand(blend) -> float:
    """Mean over slots of the number of tokens that share document and sequence; padding sees none."""
    total = slots = 0
    for index in range(blend.datasets[0].samples_per_epoch):
        sample = blend.sample(index)
        used = sample.starts[: sample.counts.tokens]
        total += sum(int((used == start).sum()) ** 2 for start in np.unique(used))
        slots += LENGTH
    return total / slots


@pytest.mark.parametrize("mode, tolerance", [("pack", 1e-9), ("mask", 0.03)])
def test_of_real_documents(tmp_path, mode, tolerance):
    blend = blend_of(run_with(tmp_path, mode))
    assert blend_attended_length(blend) == pytest.approx(attended_by_hand(blend), rel=tolerance)


def test_dry_run_before_and_after_packing(tmp_path):
    run = run_with(tmp_path, "pack")
    mean = sum(len(d) for d in random_documents(np.random.default_rng(0), 600, 50)) / 600
    before = look_at_documents(run)
    assert before.attended == assumed_attended_length(mean, LENGTH, packed=True) and not before.lines
    blend = blend_of(run)
    after = look_at_documents(run)
    assert after.attended.tokens == round(blend_attended_length(blend))
    text = describe(run, 1, after)
    assert "# Documents (pack)" in text and "of the slots filled" in text
    assert f"attention costs as much as on sequences of {after.attended.tokens:,} tokens, not {LENGTH}" in text
    work = training_flops_per_token(run.model, after.attended.tokens)
    assert f"per token {work / 1e9:.4g} GFLOP" in text and work < training_flops_per_token(run.model, LENGTH)


def test_without_files_a_length_is_assumed(tmp_path):
    run = run_with(tmp_path, "mask")
    source = run.data.train[0].model_copy(update={"path": "/nowhere"})
    found = look_at_documents(run.model_copy(update={"data": run.data.model_copy(update={"train": (source,)})}))
    assert "assuming log-normal lengths with a mean of 1,000 tokens" in found.attended.origin


def test_kept_documents_change_nothing(tmp_path):
    run = run_with(tmp_path, "keep")
    assert look_at_documents(run).attended.tokens == LENGTH and "Documents" not in describe(run, 1)


def test_it_uses_no_torch():
    code = "import sys, megatron_hybrid.train.dry_run_documents; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
