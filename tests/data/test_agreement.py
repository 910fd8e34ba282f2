"""Data, tokenizer and model that disagree about the vocabulary or the end of documents, each named with its remedy."""

import json
from dataclasses import replace

import pytest

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.config.data import DataConfig
from megatron_hybrid.data.agreement import (
    checkpoint_disagreements,
    evaluation_disagreements,
    refuse,
    run_disagreements,
)
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.preprocess import preprocess
from megatron_hybrid.data.summary import read_summary
from megatron_hybrid.data.tokenizer import load_tokenizer, vocabulary_sha256
from testing.models import SMALLEST
from tests.data.files import save_tokenizer, write_indexed


@pytest.fixture
def made(tmp_path):
    """Data made with a tokenizer of four words that ends documents with token 0: (its tokenizer, its prefix)."""
    tokenizer = save_tokenizer(tmp_path / "tok", ["<e>", "<u>", "a", "b"], "<e>")
    (tmp_path / "in.txt").write_text("a b a b b a")
    preprocess([tmp_path / "in.txt"], tmp_path / "d", tokenizer=tokenizer)
    return tokenizer, str(tmp_path / "d")


def model(**changes) -> ModelConfig:
    return ModelConfig(**SMALLEST | changes)


def data(*paths: str, tokenizer: str = "byte") -> DataConfig:
    return DataConfig(train=tuple({"path": path} for path in paths), sequence_length=4, tokenizer=tokenizer)


def found(*arguments) -> dict[str, bool]:
    """Return, by field, True if a disagreement is fatal."""
    return {told.field: told.fatal for told in run_disagreements(*arguments)}


def test_all_agree(made):
    tokenizer, prefix = made
    assert run_disagreements(model(eos_token_id=0), data(prefix, tokenizer=tokenizer)) == []
    assert run_disagreements(model(), data(prefix, tokenizer=tokenizer)) == [], "an end that is not stated agrees"
    assert run_disagreements(model(), data("a.npy")) == [], "as does the default tokenizer"


def test_the_end_of_documents(made, tmp_path):
    tokenizer, prefix = made
    told = run_disagreements(model(eos_token_id=5), data(prefix, tokenizer=tokenizer))
    assert [(t.field, t.fatal) for t in told] == [("model.eos_token_id", True), ("data.tokenizer", False)]
    with pytest.raises(
        DataError, match=r"model.eos_token_id: 5, but documents end with token 0 \(data.train.0, .*d.json"
    ):
        refuse(told)
    assert found(model(eos_token_id=5), data("a.npy", tokenizer=tokenizer)) == {"data.tokenizer": False}
    preprocess([tmp_path / "in.txt"], tmp_path / "open", tokenizer=tokenizer, append_eos=False)
    assert found(model(eos_token_id=5), data(str(tmp_path / "open"))) == {
        "model.eos_token_id": False,
        "data.tokenizer": False,
    }


def test_more_ids_than_the_model_has(made):
    tokenizer, prefix = made
    with pytest.raises(DataError, match=r"model.vocab_size: 3 is less than the 4 ids .* set it to at least 4"):
        refuse(run_disagreements(model(vocab_size=3), data(prefix)))
    with pytest.raises(DataError, match=r"data.tokenizer: .*tok has 4 ids, more than model.vocab_size 3"):
        refuse(run_disagreements(model(vocab_size=3), data("a.npy", tokenizer=tokenizer)))


def test_sources_of_different_tokenizers(made, tmp_path):
    tokenizer, prefix = made
    other = save_tokenizer(tmp_path / "other", ["<e>", "<u>", "b", "a"], "<e>")
    longer = save_tokenizer(tmp_path / "longer", ["<e>", "<u>", "a", "b", "c"], "<e>")
    for name, spec in (("x", other), ("y", longer)):
        preprocess([tmp_path / "in.txt"], tmp_path / name, tokenizer=spec)
    with pytest.raises(
        DataError, match="data.train.1: made with tokenizer .*other of 4 ids, data.train.0 with .*tok of 4"
    ):
        refuse(run_disagreements(model(), data(prefix, str(tmp_path / "x"))))
    assert found(model(), data(prefix, str(tmp_path / "y"))) == {"data.tokenizer": False, "data.train.1": True}
    assert found(model(), data(prefix, str(tmp_path / "y"), tokenizer=longer)) == {}, "it extends the other"
    with pytest.raises(DataError, match="data.tokenizer: data.train.0 was made with another tokenizer than .*other"):
        refuse(run_disagreements(model(), data(prefix, tokenizer=other)))


def test_sources_that_end_differently_where_the_model_says_nothing(made, tmp_path):
    tokenizer, prefix = made
    other = save_tokenizer(tmp_path / "other", ["<e>", "<u>", "a", "b"], "<u>")
    preprocess([tmp_path / "in.txt"], tmp_path / "x", tokenizer=other)
    assert found(model(), data(prefix, str(tmp_path / "x"), tokenizer=tokenizer)) == {"data.train.1": True}


def test_a_tokenizer_that_is_not_there_is_told_of(made):
    assert found(model(), data(made[1], tokenizer="/nowhere/tok")) == {"data.tokenizer": False}


def test_a_trained_model_is_compared_with_a_tokenizer(made, tmp_path):
    tokenizer, prefix = made
    run = {"data": data(prefix, tokenizer=tokenizer).model_dump(mode="json")}
    assert checkpoint_disagreements(model(eos_token_id=0), run, tokenizer) == []
    told = refuse(checkpoint_disagreements(model(eos_token_id=5), run, tokenizer))
    assert len(told) == 2 and all("eos" in line for line in told), "it may be exported, with warnings"
    other = save_tokenizer(tmp_path / "other", ["<e>", "<u>", "b", "a"], "<e>")
    run["data"]["train"][0]["path"] = "gone"
    with pytest.raises(DataError, match="--tokenizer: .*other is another tokenizer than the run's"):
        refuse(checkpoint_disagreements(model(), run, other))
    with pytest.raises(DataError, match="--tokenizer: .*tok has 4 ids, more than model.vocab_size 3"):
        refuse(checkpoint_disagreements(model(vocab_size=3), {}, tokenizer))


def test_data_to_evaluate_is_compared_with_the_run(made, tmp_path):
    tokenizer, prefix = made
    other = save_tokenizer(tmp_path / "other", ["<e>", "<u>", "b", "a"], "<e>")
    preprocess([tmp_path / "in.txt"], tmp_path / "x", tokenizer=other)
    named = {"data": data(prefix, tokenizer=tokenizer).model_dump(mode="json")}
    not_named = {"data": data(prefix).model_dump(mode="json")}
    for run in (named, not_named):
        assert evaluation_disagreements(model(eos_token_id=0), run, prefix) == []
        with pytest.raises(DataError, match="their ids (may )?mean different text"):
            refuse(evaluation_disagreements(model(eos_token_id=0), run, str(tmp_path / "x")))
    assert len(refuse(evaluation_disagreements(model(eos_token_id=5), named, prefix))) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{\n  "documents": 2,\n  "tok', "the summary is damaged"),
        ('{"tokens": "4", "dtype": "uint16", "tokenizer": "byte"}', "documents is None: the summary is damaged"),
    ],
)
def test_a_damaged_summary_is_named(tmp_path, content, message):
    prefix = write_indexed(tmp_path / "a", [[1, 2]])
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=f"a.json: .*{message}"):
        run_disagreements(model(), data(prefix))


@pytest.mark.parametrize("content", ['{"text": "a"}\n{"text": "b"}\n', "[]", '{"text": "a"}', "\x00\xff"])
def test_another_file_of_that_name_is_no_summary(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert read_summary(str(tmp_path / "a")) is None


def test_a_summary_of_an_earlier_version_is_read(made):
    tokenizer, prefix = made
    now = read_summary(prefix)
    assert now.vocabulary_sha256 == vocabulary_sha256(load_tokenizer(tokenizer))
    with open(f"{prefix}.json", "r+") as file:
        told = json.load(file)
        del told["vocabulary_sha256"]
        file.seek(0)
        file.truncate()
        json.dump(told, file)
    assert read_summary(prefix) == replace(now, vocabulary_sha256=None)
    assert run_disagreements(model(eos_token_id=0), data(prefix, tokenizer=tokenizer)) == []
