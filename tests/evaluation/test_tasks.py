"""Downstream tasks: local files, lm-eval's harness where it is installed, and long-context generators."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.data.tokenizer import ByteTokenizer
from megatron_hybrid.evaluation.local_tasks import _best, _match, evaluate_choices
from megatron_hybrid.evaluation.long_context import write_long_context_tasks
from megatron_hybrid.evaluation.run_tasks import check_tasks
from megatron_hybrid.evaluation.stdlib_tasks import write_stdlib_tasks
from megatron_hybrid.evaluation.task_files import read_task, task_paths
from tests.evaluation import task_jobs

LIMIT = 3


def test_the_evaluators_agree(ranks, tmp_path):
    """The package's own evaluator on one rank and on two; lm-eval with our model, and with its `hf` backend on the export."""
    harness = all(importlib.util.find_spec(name) for name in ("lm_eval", "accelerate"))
    (found,) = ranks.run(task_jobs.results_of_evaluators, 1, folder=str(tmp_path), limit=LIMIT, harness=harness)
    assert {task for task, _ in found["own"]} == {"http_status", "html_entity", "next_month"}
    assert len(found["own"]) == 7 and any(0 < value < 1 for value in found["own"].values())
    assert found["own"] == found["export"] == found["by transformers"]
    shared = ranks.run(task_jobs.results_on_ranks, 2, folder=str(tmp_path), limit=LIMIT)
    assert shared == [found["own"]] * 2
    if not harness:
        pytest.skip("lm_eval is not installed: its harness was not compared")
    assert found["lm-eval"] == found["hf backend"] == found["own"]
    assert found["texts"] == found["hf texts"] and any(found["texts"])


def test_stdlib_tasks_are_the_same_for_a_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_stdlib_tasks(tmp_path / name, seed)
    texts = [(tmp_path / name / "http_status.jsonl").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]
    task = read_task(tmp_path / "a" / "http_status.yaml")
    (teapot,) = (d for d in task.documents if d["question"].endswith("418"))
    assert teapot["choices"][teapot["answer"]] == "I'm a Teapot"
    with pytest.raises(UserError, match="not empty"):
        write_stdlib_tasks(tmp_path / "a")


def test_long_context_documents_fill_their_length(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_long_context_tasks(tmp_path / name, ByteTokenizer(), [5000, 8000], 2, seed)
    paths = task_paths(tmp_path / "a")
    assert [path.stem for path in paths] == sorted(
        f"{n}_{k}" for n in ("needle", "variables", "common_words") for k in (5000, 8000)
    )
    for path in paths:
        same, other = ((tmp_path / name / f"{path.stem}.jsonl").read_text() for name in "bc")
        assert path.with_suffix(".jsonl").read_text() == same != other
        task = read_task(path)
        length, answer = int(path.stem.rpartition("_")[2]), task.config["generation_kwargs"]["max_gen_toks"]
        for document in task.documents:
            assert length - 600 < len(document["prompt"]) + answer <= length
            assert all(text in document["prompt"] for text in document["answers"])
            right = " ".join(document["answers"])
            assert _match(task, document["answers"], right) == {"recall": 1.0}
            assert _match(task, document["answers"], "nothing") == {"recall": 0.0}
    variables = read_task(tmp_path / "a" / "variables_5000.yaml").documents[0]
    values = dict(
        line.removeprefix("VAR ").split(" = ") for line in variables["prompt"].splitlines() if "VAR" in line[:3]
    )

    def value(name: str) -> str:
        return name if name.isdigit() else value(values[name])

    asked = variables["prompt"].rpartition("value ")[2].partition("?")[0]
    assert sorted(name for name in values if value(name) == asked) == sorted(variables["answers"])
    with pytest.raises(UserError, match="too short"):
        write_long_context_tasks(tmp_path / "d", ByteTokenizer(), [200], 1)


def test_norms_and_bits_per_byte(tmp_path):
    documents = '{"q": "?", "c": ["ab", "\u00e9\u00e9\u00e9"], "a": 1}'
    (tmp_path / "t.jsonl").write_text(documents + "\n")
    metrics = [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes", "bits_per_byte")]
    config = GOOD | dict(doc_to_choice="c", output_type="multiple_choice", metric_list=metrics)
    (tmp_path / "t.yaml").write_text(json.dumps(config))
    task = read_task(tmp_path / "t.yaml")
    (document,) = task.documents
    found = _best(task, document, document["c"], [-2.0, -2.7])  # per character -1 and -0.9, per byte -1 and -0.45
    assert found == {"acc": 0.0, "acc_norm": 1.0, "acc_bytes": 1.0, "bits_per_byte": pytest.approx(2.7 / 0.6931472 / 6)}
    assert _best(task, document, document["c"], [-2.0, -9.0])["acc_bytes"] == 0.0


GOOD = dict(
    task="t", dataset_path="json", dataset_kwargs={"data_files": {"test": "t.jsonl"}}, test_split="test", doc_to_text="q",
    doc_to_target="a", output_type="generate_until",
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(tsak=1), "tsak: not supported without lm-eval (the nearest field is task)"),
        (dict(output_type="loglikelihood"), "output_type: loglikelihood is not one of"),
        (dict(output_type="multiple_choice"), "doc_to_choice: is missing"),
        (dict(metric_list=[{"metric": "bleu"}]), "metric_list"),
        (dict(dataset_path="allenai/arc"), "nothing is downloaded"),
        (dict(test_split="train"), "test_split: train is not in"),
        (dict(num_fewshot=2), "fewshot_config"),
        (dict(generation_kwargs={"num_beams": 2}), "generation_kwargs.num_beams"),
        (dict(dataset_kwargs={"data_files": {"test": "none.jsonl"}}), "cannot be read"),
    ],
)
def test_files_outside_the_subset_are_refused(tmp_path, change, message):
    (tmp_path / "t.jsonl").write_text(json.dumps({"q": "1", "a": "2"}) + "\n")
    (tmp_path / "t.yaml").write_text(json.dumps(GOOD))
    check_tasks([str(tmp_path)], lm_eval=False)
    (tmp_path / "t.yaml").write_text(json.dumps(GOOD | change))
    with pytest.raises(UserError) as caught:
        check_tasks([str(tmp_path)], lm_eval=False)
    assert message in str(caught.value) and "t.yaml" in str(caught.value) + str(Path("t.yaml"))


def test_functions_need_lm_eval(tmp_path):
    (tmp_path / "t.yaml").write_text("task: t\nprocess_results: !function metrics.f\n")
    with pytest.raises(UserError, match="without lm-eval"):
        check_tasks([str(tmp_path)], lm_eval=False)
    with pytest.raises(UserError, match="no task is there"):
        check_tasks([str(tmp_path / "none")], lm_eval=False)


@pytest.mark.parametrize(
    ("choices", "template", "answer", "right"),
    [
        (["3", "5", "1"], "answer", "1", "1"),  # the text of a choice, though it is also the index of one
        (["3", "5", "1"], "answer", 2, "1"),
        (["12", "15"], "answer", "12", "12"),
        (["12", "15"], "answer", "1", "15"),
        (["3", "5", "1"], "{{answer}}", "1", "5"),  # lm-eval takes the digits of a template for an index
    ],
)
def test_digits_are_texts_in_fields_and_indices_in_templates(tmp_path, choices, template, answer, right):
    (tmp_path / "t.jsonl").write_text(json.dumps({"q": "what", "choices": choices, "answer": answer}))
    fields = dict(
        task="digits", dataset_path="json", dataset_kwargs={"data_files": {"test": "t.jsonl"}}, test_split="test"
    )
    fields |= dict(output_type="multiple_choice", doc_to_text="q", doc_to_choice="choices", doc_to_target=template)
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(fields))
    task = read_task(tmp_path / "t.yaml")

    def score(pairs):
        return [0.0 if bytes(choice).strip() == right.encode() else -9.0 for _, choice in pairs]

    assert evaluate_choices(task, ByteTokenizer(), score)["acc"] == 1.0
