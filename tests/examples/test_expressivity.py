"""The grid of examples/expressivity: its runs, its scheduler, and its report. Runs are replaced by short scripts."""

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

TASKS = ("state_tracking", "recall", "state_based_recall", "state_tracking_small")


@pytest.fixture
def grid(root):
    sys.path[:0] = [str(root / "examples" / "expressivity"), str(root / "benchmarks")]
    try:
        import grid

        yield grid
    finally:
        del sys.path[:2]


def arguments(grid, tmp_path, task: str, **changes) -> SimpleNamespace:
    found = dict(task=task, models=grid.MODELS, seeds=1, lrs=None, schedules=None, runs=str(tmp_path), overrides=[])
    return SimpleNamespace(**found | changes)


@pytest.mark.parametrize("task", TASKS)
def test_the_five_models_of_each_task(grid, tmp_path, task):
    runs = {run.model: run.config for run in grid.grid(arguments(grid, tmp_path, task))}
    patterns = {name: "".join(config.model.layers) for name, config in runs.items()}
    hybrid = "GA" if task.endswith("small") else "GGGA"
    pure = {kind: kind * len(hybrid) for kind in "GA"}
    assert patterns == {
        "transformer": pure["A"], "gdn_negative": pure["G"], "gdn_positive": pure["G"],
        "hybrid_negative": hybrid, "hybrid_positive": hybrid,
    }  # fmt: skip
    signs = {name: config.model.gdn and config.model.gdn.allow_negative_eigenvalues for name, config in runs.items()}
    assert signs == {
        "transformer": None, "gdn_negative": True, "gdn_positive": False, "hybrid_negative": True, "hybrid_positive": False,
    }  # fmt: skip
    sizes = {set_[0].generator.size for config in runs.values() for set_ in config.data.validation.values()}
    assert max(sizes) == (16 if task.endswith("small") else 128)


def test_runs_differ_in_rate_schedule_and_seed(grid, tmp_path):
    chosen = dict(lrs=[1e-4, 3e-4], schedules=["cosine", "constant"], seeds=2, overrides=["train.steps=300"])
    runs = list(grid.grid(arguments(grid, tmp_path, "state_tracking", **chosen)))
    assert len(runs) == len({run.folder for run in runs}) == 40
    assert [run.model for run in runs[:5]] == [*grid.MODELS], "every model begins with the first seed and rate"
    settings = {
        (c.train.seed, c.data.seed, c.train.optimizer.lr, c.train.schedule.kind) for c in (r.config for r in runs)
    }
    assert len(settings) == 8 and {run.config.train.steps for run in runs} == {300}


def script(folder, text: str):
    """A run that is a script, in which F is its folder."""
    folder.mkdir()
    path = folder / "metrics.jsonl"
    code = f"import json, pathlib, signal, sys, time\nF = pathlib.Path({str(folder)!r})\n{text}"

    class Scripted:
        model = "transformer"

        @property
        def is_finished(self) -> bool:
            return path.exists()

        def start(self, environment):
            return subprocess.Popen([sys.executable, "-c", code], env=environment)

    found = Scripted()
    found.folder = folder
    return found


FINISH = "(F / 'metrics.jsonl').write_text('{}')"


def test_the_scheduler_fills_its_slots_and_resumes(grid, tmp_path, monkeypatch):
    from concurrent_runs import Scheduler

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    write = "import os\n(F / 'gpu').write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
    runs = [script(tmp_path / str(number), write + FINISH) for number in range(5)]
    runs.append(script(tmp_path / "broken", "sys.exit(3)"))
    first = Scheduler(runs, gpus=2, per_device=2, deadline=time.monotonic() + 60)
    first.work()
    assert first.failed == runs[-1:] and sorted(first.slots) == [0, 0, 1, 1]
    assert {(run.folder / "gpu").read_text() for run in runs[:5]} == {"3", "5"}
    assert Scheduler(runs, 2, 2, 0.0).waiting == runs[-1:]


def test_the_time_limit_stops_all_runs_with_a_request(grid, tmp_path):
    from concurrent_runs import Scheduler

    patient = "signal.signal(signal.SIGTERM, lambda *_: ((F / 'saved').touch(), sys.exit(75)))\n(F / 'ready').touch()\ntime.sleep(60)"
    runs = [script(tmp_path / str(number), patient) for number in range(3)]
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    scheduler = Scheduler(runs, gpus=0, per_device=2, deadline=time.monotonic() + 1.5)
    try:
        scheduler.work()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert [run.folder.joinpath("saved").exists() for run in runs] == [True, True, False]
    assert scheduler.failed == [] and scheduler.waiting == runs[2:]


def evaluated_runs(tmp_path) -> list:
    """Two runs each of two models, evaluated at steps 2 and 3."""
    runs = []
    for model, accuracies in {"hybrid_negative": (0.4, 1.0), "transformer": (0.3, 0.25)}.items():
        for seed, accuracy in enumerate(accuracies, 1):
            folder = tmp_path / f"{model}-lr0.1-cosine-seed{seed}"
            folder.mkdir()
            records = [
                {"step": 1, "seconds": 9.0},
                {"step": 2, "seconds": 0.5, "eval/n4/accuracy": 0.1, "eval/n128/accuracy": 0.0},
            ]
            records.append({"step": 3, "seconds": 0.4, "eval/n4/accuracy": 1.0, "eval/n128/accuracy": accuracy})
            (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            runs.append((model, folder))
    return runs


def reported(runs, out) -> dict:
    """Return the rows of a report by case and metric."""
    from expressivity import report

    report("state_tracking", runs, out)
    (path,) = out.glob("*.json")
    return {(row["case"], row["metric"]): row for row in json.loads(path.read_text())["rows"]}


def test_the_report_takes_the_best_run_of_each_model(grid, tmp_path):
    rows = reported(evaluated_runs(tmp_path), tmp_path / "out")
    best = rows["hybrid, negative", "accuracy at n = 128"]
    assert (best["ours"], best["peer"], best["goal"], best["met"]) == (1.0, 1, 0.99, True)
    other = rows["transformer", "accuracy at n = 128"]
    assert (other["ours"], other["peer"], other["goal"], other["met"]) == (0.3, 0.23, 0.5, True)
    assert rows["hybrid, negative", "lowest accuracy of all runs at n = 128"]["ours"] == 0.4
    assert rows["transformer", "median step"]["ours"] == 0.5, "without the first step, which compiles"
    assert rows["transformer", "runs"]["ours"] == 2 and rows["transformer", "steps"]["ours"] == 3
    assert [*(tmp_path / "out").glob("expressivity_state_tracking-*.png")]
    each = [rows[f"hybrid, negative, lr 0.1, cosine, seed {seed}", "accuracy of the run at n = 128"] for seed in (1, 2)]
    assert [row["ours"] for row in each] == [0.4, 1.0]
    assert rows["transformer, lr 0.1, cosine, seed 2", "steps of the run"]["ours"] == 3


def test_kept_evaluations_give_the_same_report(grid, tmp_path):
    from expressivity import keep_evaluations

    runs = evaluated_runs(tmp_path)
    keep_evaluations("state_tracking", [folder for _, folder in runs], tmp_path / "kept")
    kept = [(model, tmp_path / "kept" / "state_tracking" / folder.name) for model, folder in runs]
    assert reported(kept, tmp_path / "b") == reported(runs, tmp_path / "a")
    steps = [json.loads(line)["step"] for line in (kept[0][1] / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    chosen = dict(models=["transformer"], lrs=[0.1], overrides=["train.steps=3", "train.schedule.warmup_steps=1"])
    (run,) = grid.grid(arguments(grid, tmp_path / "kept", "state_tracking", **chosen))
    assert run.is_finished


def test_a_report_names_a_folder_that_is_no_run(grid, tmp_path):
    (model, folder), *_ = evaluated_runs(tmp_path)
    other = folder.rename(tmp_path / "hybrid")
    with pytest.raises(ValueError, match="hybrid: its name does not end with -lrRATE-SCHEDULE-seedNUMBER"):
        reported([(model, other)], tmp_path / "out")


def test_the_recorded_accuracies_have_the_order_of_the_paper(root):
    """Trained on at most 8 swaps, only the models with negative eigenvalues track the state over 16. Chance is 1/3."""
    (path,) = (root / "benchmarks" / "results").glob("expressivity_state_tracking_small-*.json")
    found = {(row["case"], row["metric"]): row["ours"] for row in json.loads(path.read_text())["rows"]}
    models = {case for case, _ in found}
    assert len(models) == 5
    solving = {model for model in models if model.endswith("negative")}
    lowest = min(found[model, "lowest accuracy of all runs at n = 16"] for model in solving)
    highest = max(found[model, "accuracy at n = 16"] for model in models - solving)
    assert lowest >= 0.95 and lowest - highest >= 0.3
