"""Losses of named validation sets during training: against transformers on the exported model, and bytes counted by hand."""

import json
import math
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.text_bytes import TextBytes
from testing import jobs
from testing.layouts import layout
from testing.models import hybrid
from tests.convert.test_huggingface import to_theirs
from tests.data.files import save_tokenizer, write_raw

LENGTH, EOS = 24, 256
MODEL = hybrid("GA*2", 32, 2, 8, vocab_size=257)
LAYOUTS = {
    # name: (ranks, layout, micro-batch size)
    "DP2": (2, layout(), 1),
    "CP2": (2, layout(cp=2), 4),
    "TP2, PP2, VPP2": (4, layout(2, 2, 2), 2),
}


def corpora(folder: Path) -> dict[str, np.ndarray]:
    """Tokens of source code and of a table of addresses, in UTF-8 with end-of-document tokens."""
    texts = {
        "train": [Path(sysconfig.get_path("stdlib"), "json", "decoder.py").read_text()],
        "code": [Path(sysconfig.get_path("stdlib"), "this.py").read_text()[:700], "def f(x):\n    return 2 * x\n" * 6],
        "docs": ["Grüße aus Köln, où l'été est court. " * 9, "Δ = b² − 4ac ≥ 0. " * 11],
    }
    found = {}
    for name, documents in texts.items():
        found[name] = np.array([token for text in documents for token in (*text.encode(), EOS)])
        write_raw(folder / f"{name}.npy", found[name])
    return found


def config(folder: Path, parallel: dict, micro_batch_size: int) -> dict:
    sources = {name: [{"path": str(folder / f"{name}.npy")}] for name in ("train", "code", "docs")}
    sets = {name: sources[name] for name in ("docs", "code")}
    return dict(
        run_dir=str(folder / "run"),
        model=MODEL,
        data=dict(train=sources["train"], validation=sets, sequence_length=LENGTH),
        train=dict(
            steps=2,
            global_batch_size=8,
            micro_batch_size=micro_batch_size,
            dtype="fp32",
            eval_interval=2,
            eval_batches=None,
            optimizer=dict(lr=3e-3),
        ),
        parallel=parallel,
        logging=dict(plot_interval=0),
    )


def evaluation(folder: Path) -> dict:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return {key: value for key, value in json.loads(lines[-1]).items() if key.startswith("eval")}


def by_transformers(export: Path, tokens: np.ndarray) -> tuple[float, float, int]:
    """Mean loss, bits per byte and number of tokens over all whole samples, by transformers and by a loop over labels."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(export, attn_implementation="eager")
    nats, bytes_, count = 0.0, 0, 0
    for start in range(0, len(tokens) - LENGTH, LENGTH):
        row = torch.from_numpy(tokens[start : start + LENGTH + 1])
        with torch.no_grad():
            logits = model(row[None, :-1]).logits[0].double()
        nats += F.cross_entropy(logits, row[1:], reduction="sum").item()
        bytes_ += sum(1 for token in row[1:].tolist() if token != EOS)
        count += LENGTH
    return nats / count, nats / math.log(2) / bytes_, count


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_are_those_of_transformers(name, ranks, tmp_path):
    count, parallel, micro_batch_size = LAYOUTS[name]
    tokens = corpora(tmp_path)
    ranks.run(jobs.pretrain_run, count, config=config(tmp_path, parallel, micro_batch_size))
    found = evaluation(tmp_path)
    assert to_theirs(tmp_path / "run" / "checkpoints" / "step-00000002", tmp_path / "export") == 0
    for set_name in ("docs", "code"):
        loss, bits, samples = by_transformers(tmp_path / "export", tokens[set_name])
        assert found[f"eval/{set_name}/loss"] == pytest.approx(loss, rel=1e-5)
        assert found[f"eval/{set_name}/perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert found[f"eval/{set_name}/bits_per_byte"] == pytest.approx(bits, rel=1e-5)
        assert found[f"eval/{set_name}/tokens"] == samples
        assert samples // LENGTH % 8, "the last global batch is not full"
    assert "eval_loss" not in found


def test_a_plain_list_is_a_set_without_a_name(ranks, tmp_path):
    corpora(tmp_path)
    run = config(tmp_path, {}, 2)
    run["data"] |= {"validation": run["data"]["validation"]["docs"], "tokenizer": str(tmp_path / "nowhere")}
    run["train"]["eval_batches"] = 1
    ranks.run(jobs.pretrain_run, 1, config=run)
    found = evaluation(tmp_path)
    assert found.keys() == {"eval_loss", "eval_perplexity", "eval_tokens"}, "bytes are unknown without the tokenizer"
    assert found["eval_tokens"] == 8 * LENGTH


def test_bytes_of_a_byte_level_tokenizer(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from megatron_hybrid.data.tokenizer import load_tokenizer

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = "Grüße aus Köln: Δ = b² − 4ac ≥ 0 😀\n" * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text], trainer)
    backend.add_tokens(["  "])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    tokenizer = load_tokenizer(tmp_path)
    sizes = tokenizer.token_bytes()
    for part in (text, "x  y", "a cat's naïve 猫"):
        ids = tokenizer.encode(part)
        assert sum(sizes[token] for token in ids) == len(part.encode()) and len(ids) > 1
    assert sizes[tokenizer.eos_token_id] == 0

    found = TextBytes.of(str(tmp_path), 400, [])
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text[:9]), tokenizer.eos_token_id]])
    assert found.count(Batch.of_samples(ids)) == len(text[:9].encode())
    assert math.isnan(found.count(Batch.of_samples(torch.tensor([[1, 399]])))), "not a token of the tokenizer"


def test_bytes_that_are_unknown_have_a_reason(tmp_path):
    words = save_tokenizer(tmp_path / "words", ["<eos>", "<unk>", "cat"], "<eos>")
    assert "is not a byte-level BPE" in TextBytes.of(words, 10, []).unknown_reason
    assert "neither `byte` nor a local folder" in TextBytes.of("gone", 10, []).unknown_reason
    summary = dict(documents=1, tokens=9, max_token=3, dtype="uint16", tokenizer=words, vocab_size=300, eos_token_id=0)
    (tmp_path / "data.json").write_text(json.dumps(summary | {"append_eos": True}))
    found = TextBytes.of("byte", 300, [str(tmp_path / "data")])
    assert "made with another tokenizer" in found.unknown_reason
    assert math.isnan(found.count(Batch.of_samples(torch.zeros(1, 3, dtype=torch.int64))))
