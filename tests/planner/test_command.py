"""Search and tools/tune_parallelism.py: ranking, rejections, files and text."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_hybrid.base.errors import BAD_INPUT, ConfigError, UserError
from megatron_hybrid.config.load import dump_run, load_run
from megatron_hybrid.planner import measure, report
from megatron_hybrid.planner.calibration import Measured
from megatron_hybrid.planner.command import Request, answer
from megatron_hybrid.planner.emit import apply_plan
from megatron_hybrid.planner.hardware import load
from megatron_hybrid.planner.job import Job
from megatron_hybrid.planner.layouts import degrees_of
from megatron_hybrid.planner.search import search
from tests.planner.test_memory import MODEL

ASK = Request("olmo_hybrid_7b", 64, sequence_length=8192, global_batch_size=512)
FEW = replace(ASK, gpus=8, global_batch_size=64)
"""One node, which has fewer layouts."""


@pytest.fixture(scope="module")
def found():
    return search(Job(MODEL, 64, load("h100-80gb"), 8192, 512))


def test_all_that_fits_fits_and_is_in_order(found):
    assert found.candidates and found.rejections
    times = [c.step.seconds for c in found.candidates[:40]]
    assert times == sorted(times)
    for candidate in found.candidates:
        assert candidate.need <= found.job.hardware.memory_bytes
        assert (
            candidate.plan.global_batch_size
            == candidate.plan.micro_batch_size * candidate.plan.dp * candidate.plan.microbatches
        )


def test_more_memory_never_slows_the_best():
    job = Job(MODEL, 8, load("h100-80gb"), 8192, 64)
    few = search(job)
    twin = replace(job.hardware, memory_bytes=load("h200").memory_bytes)
    more = search(replace(job, hardware=twin))
    assert len(more.candidates) > len(few.candidates)
    assert more.candidates[0].step.seconds <= few.candidates[0].step.seconds


@pytest.mark.parametrize(("gigabytes", "kept"), [(141, True), (110, False)])
def test_states_are_kept_where_memory_is_left(gigabytes, kept):
    """OLMo Hybrid's states are 6 GB on one GPU. Without them its best layout for 16 GPUs needs 107 GB."""
    job = Job(MODEL, 16, replace(load("h200"), memory_bytes=gigabytes * 1e9), 8192, 512)
    best = search(job).candidates[0]
    assert best.plan.parallel.recompute_granularity == "none"
    assert best.plan.parallel.keep_delta_rule_states == kept and ("states-kept" in best.plan.label) == kept


def test_every_layout_has_one_outcome(found):
    ways = [tuple(degrees_of(c.plan).items()) for c in found.candidates]
    assert len(set(ways)) == len(ways)
    full = [tuple(r.degrees.items()) for r in found.rejections if "recompute" in r.degrees]
    assert not set(full) & set(ways)


def test_emitted_runs_load_and_pass_the_trainers_checks(tmp_path):
    for number, question in enumerate(
        (
            FEW,
            replace(FEW, sequence_length=65536),
            replace(ASK, model="examples/configs/pretrain_hybrid_7b.yaml", global_batch_size=None, precision="fp8"),
            replace(ASK, model="olmo_hybrid_tiny", gpus=4, sequence_length=64, global_batch_size=8),
        )
    ):
        path = tmp_path / f"{number}.yaml"
        best = json.loads(answer(replace(question, emit=path, json=True)))["candidates"][0]
        run = load_run(str(path))
        run.check_world(question.gpus)
        assert run.parallel.tensor_parallel_size == best["tp"] and run.train.micro_batch_size == best["mbs"]
    assert run.data.sequence_length == 64 and run.data.train[0].path == "data/train"
    kept = load_run(str(tmp_path / "2.yaml"))
    assert kept.precision.fp8_recipe == "tensorwise" and kept.data.train[0].path == "data/olmo_mix/*.npy"


def test_an_emitted_run_is_a_whole_recipe(tmp_path):
    """A preset's published recipe, or everything that the given run states, extended files included."""
    path = tmp_path / "run.yaml"
    answer(replace(FEW, global_batch_size=512, emit=path))
    run = load_run(str(path))
    assert (
        run.train.steps == 1_413_822 and run.train.schedule.warmup_steps == 2000 and run.train.schedule.kind == "cosine"
    )
    assert run.data.tokenizer == "tokenizers/dolma2" and run.train.optimizer.lr == 3e-4
    assert (
        "# Placeholders, because olmo_hybrid_7b does not state them: run_dir, data.train. Replace them."
        in path.read_text()
    )

    asked = "examples/stages/olmo_hybrid_7b/midtrain.yaml"
    answer(replace(FEW, model=asked, sequence_length=None, global_batch_size=None, emit=path))
    given, found = load_run(asked), load_run(str(path))
    assert "Placeholders" not in path.read_text()
    for section in ("model", "data", "checkpoint", "precision"):
        assert getattr(found, section) == getattr(given, section)
    assert found.train == given.train.model_copy(update={"micro_batch_size": found.train.micro_batch_size})


def test_overlapped_tensor_parallelism_is_kept_where_it_fits(tmp_path):
    asked, path = tmp_path / "asked.yaml", tmp_path / "run.yaml"
    run = load_run("examples/configs/pretrain_hybrid_7b.yaml", ["parallel.tp_comm_overlap=true"])
    asked.write_text(dump_run(run))
    question = replace(ASK, model=str(asked), emit=path)
    kept = {}
    for changes in ({}, dict(gpus=8, gpu="h200")):
        answer(replace(question, **changes))
        parallel = load_run(str(path)).parallel
        kept[parallel.tensor_parallel_size > 1] = parallel.tp_comm_overlap
    assert kept == {True: True, False: False}


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ("tp=4", "the best is number"),
        ("tp=16", "waits for the network"),
        ("cp=2", "slower than TP2"),
        ("cp=8", "would leave a rank 1024 tokens"),
        ("pp=64", "more pipeline ranks than the 32 layers"),
        ("tp=1,pp=1,mbs=4,recompute=none", "needs"),
        ("zero=false", "all of the optimizer's state on every rank"),
        ("tp=3", "no such layout"),
    ],
)
def test_why(found, condition, says):
    assert says in report.explain(found, condition)


def test_long_sequences_are_shared_and_the_run_says_so(tmp_path):
    """65,536 tokens on 512 GPUs: 64 sequences per step leave eight GPUs for each."""
    path = tmp_path / "run.yaml"
    question = replace(ASK, gpus=512, sequence_length=65536, global_batch_size=64, emit=path)
    best = json.loads(answer(replace(question, json=True)))["candidates"][0]
    run = load_run(str(path))
    run.check_world(512)
    assert best["cp"] == run.parallel.context_parallel_size > 1
    assert best["time"]["CP communication"] > 0
    assert "exceeds the" in answer(replace(question, why=["tp=4,cp=32"], emit=None))


def test_the_table_and_the_breakdown():
    text = answer(replace(FEW, top=3))
    assert "3." in text and "4. " not in text.split("\n\n")[1]
    for part in ("weights", "activations: Gated DeltaNet", "GEMMs", "delta rule", "assumed", "between nodes"):
        assert part in text


def test_a_picture(tmp_path):
    answer(replace(FEW, plot=tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(gpus=0), "gpus: 0 is not a positive number"),
        (dict(gpu="h900"), "gpu: h900 has no hardware file"),
        (dict(sequence_length=None), "data.sequence_length: is missing; give --sequence-length"),
        (dict(model="olmo_hybrid"), "did you mean olmo_hybrid_"),
        (dict(why=["tp"]), "why: 'tp' is not one of"),
        (dict(gpus=8, global_batch_size=9, sequence_length=2**20, emit="x"), "no layout fits"),
    ],
)
def test_wrong_questions(change, says):
    with pytest.raises(ConfigError, match=says):
        answer(replace(FEW, **change))


def test_the_tool_ends_with_its_status(root):
    command = [sys.executable, "tools/tune_parallelism.py", "--gpus", "8", "--model"]
    done = subprocess.run([*command, "nope"], cwd=root, capture_output=True, text=True)
    assert done.returncode == BAD_INPUT and "Traceback" not in done.stderr and "nope" in done.stderr


def test_the_planner_does_without_torch(root):
    code = (
        "import sys; from megatron_hybrid.planner.command import Request, answer;"
        "answer(Request('olmo_hybrid_7b', 1024, sequence_length=8192, global_batch_size=1024));"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_measurements_calibrate(tmp_path, monkeypatch):
    """Steps take a quarter longer than predicted; no trainer runs."""

    def measured(run, candidate):
        return dict(layout=candidate.plan.label, gpus=candidate.plan.world_size, seconds=1.25 * candidate.step.seconds,
                    config=apply_plan(run, candidate.plan).model_dump(mode="json"),
                    peak_bytes=1.02 * candidate.memory.total)  # fmt: skip

    monkeypatch.setattr(measure, "measure", measured)
    monkeypatch.setattr(measure, "check_local_devices", lambda hardware, gpus: None)
    path = tmp_path / "calibration.yaml"
    text = answer(replace(FEW, measure=3, calibration=path))
    assert text.startswith("measured:") and "before -20.0%" in text
    plain, calibrated = (
        json.loads(answer(replace(FEW, json=True, calibration=c)))["candidates"][0] for c in (None, path)
    )
    assert calibrated["seconds"] == pytest.approx(1.25 * plain["seconds"], rel=0.03)
    shares = [one["device_bytes"] / one["memory_bytes"] for one in (plain, calibrated)]
    assert shares[1] == pytest.approx(1.02 * shares[0], rel=5e-3)
    with pytest.raises(ConfigError, match="is a calibration of"):
        answer(replace(FEW, gpu="h200", calibration=path))


@pytest.fixture
def tiny():
    """Run of the tiny model, and a candidate for one rank of this machine."""
    run = load_run("olmo_hybrid_tiny", ["run_dir=x", "train.steps=1", "train.global_batch_size=1",
                                        "data.train=[{path: x}]", "data.sequence_length=64"])  # fmt: skip
    return run, search(Job(run.model, 1, load("h200"), 64, 1)).candidates[0]


def test_a_candidate_is_measured_through_the_real_engine(tiny):
    seen = measure.measure(*tiny, steps=2)
    assert seen["seconds"] > 0 and seen["device"] == "cpu" and Measured.of(seen).plan.label == seen["layout"]


def test_a_run_that_fails_says_its_last_words(tiny):
    run, candidate = tiny
    broken = run.model_copy(update={"model": run.model.model_copy(update={"backend": "transformer_engine"})})
    with pytest.raises(UserError, match="could not be measured:(.|\\n)*transformer_engine cannot run"):
        measure.measure(broken, candidate, steps=2)
