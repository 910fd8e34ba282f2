"""The grid of examples/expressivity: its runs, its scheduler, and its report. Runs are replaced by short scripts."""

import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

TASKS = ("state_tracking", "recall", "recall_mixed", "state_based_recall", "state_tracking_small")


@pytest.fixture
def grid(root):
    folders = [str(root / "examples" / "expressivity"), str(root / "examples"), str(root / "benchmarks")]
    sys.path[:0] = folders
    try:
        import grid

        yield grid
    finally:
        del sys.path[: len(folders)]


@pytest.fixture
def origin(grid):
    from origins import Origin

    return Origin("abc1234", "NVIDIA H200", {"python": "3.12.3", "torch": "2.11.0"})


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


def test_the_scheduler_fills_its_slots_and_resumes(grid, origin, tmp_path, monkeypatch):
    from concurrent_runs import Scheduler
    from origins import read_origins

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    write = "import os\n(F / 'gpu').write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
    runs = [script(tmp_path / str(number), write + FINISH) for number in range(5)]
    runs.append(script(tmp_path / "broken", "sys.exit(3)"))
    first = Scheduler(runs, gpus=2, per_device=2, deadline=time.monotonic() + 60, origin=origin)
    first.work()
    assert first.failed == runs[-1:] and sorted(first.slots) == [0, 0, 1, 1]
    assert {(run.folder / "gpu").read_text() for run in runs[:5]} == {"3", "5"}
    assert read_origins(run.folder for run in runs) == origin, "also of the one that failed"
    assert Scheduler(runs, 2, 2, 0.0, origin).waiting == runs[-1:]


def test_the_time_limit_stops_all_runs_with_a_request(grid, origin, tmp_path):
    from concurrent_runs import Scheduler

    patient = "signal.signal(signal.SIGTERM, lambda *_: ((F / 'saved').touch(), sys.exit(75)))\n(F / 'ready').touch()\ntime.sleep(60)"
    runs = [script(tmp_path / str(number), patient) for number in range(3)]
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    scheduler = Scheduler(runs, gpus=0, per_device=2, deadline=float("inf"), origin=origin)

    def end_the_time_once_two_run() -> None:
        while sum((run.folder / "ready").exists() for run in runs) < 2:
            time.sleep(0.01)
        scheduler.deadline = 0.0

    threading.Thread(target=end_the_time_once_two_run, daemon=True).start()
    try:
        scheduler.work()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert [run.folder.joinpath("saved").exists() for run in runs] == [True, True, False]
    assert scheduler.failed == [] and scheduler.waiting == runs[2:]


@pytest.fixture
def evaluated_runs(tmp_path, origin) -> list:
    """Folders of two runs each of two models, evaluated at steps 2 and 3."""
    from origins import write_origin

    folders = []
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
            write_origin(folder, origin)
            folders.append(folder)
    return folders


def reported(folders, out) -> dict:
    """Return the rows of a report by case and metric."""
    from expressivity import report

    report("state_tracking", folders, out)
    (path,) = out.glob("*.json")
    return {(row["case"], row["metric"]): row for row in json.loads(path.read_text())["rows"]}


def test_the_report_takes_the_best_run_of_each_model(evaluated_runs, tmp_path):
    rows = reported(evaluated_runs, tmp_path / "out")
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


def test_kept_evaluations_give_the_same_report(grid, evaluated_runs, tmp_path):
    from expressivity import keep_evaluations

    keep_evaluations("state_tracking", evaluated_runs, tmp_path / "kept")
    kept = [tmp_path / "kept" / "state_tracking" / folder.name for folder in evaluated_runs]
    assert reported(kept, tmp_path / "b") == reported(evaluated_runs, tmp_path / "a")
    steps = [json.loads(line)["step"] for line in (kept[0] / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    chosen = dict(models=["transformer"], lrs=[0.1], overrides=["train.steps=3", "train.schedule.warmup_steps=1"])
    (run,) = grid.grid(arguments(grid, tmp_path / "kept", "state_tracking", **chosen))
    assert run.is_finished


def test_a_report_says_where_the_runs_trained(evaluated_runs, origin, tmp_path):
    from origins import write_origin

    newer = replace(origin, commit="def5678", versions={"python": "3.12.3", "torch": "2.12.0", "triton": None})
    write_origin(evaluated_runs[0], newer)
    reported(evaluated_runs, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "expressivity_state_tracking-H200.json").read_text())
    assert (found["machine"], found["commit"]) == ("NVIDIA H200", "abc1234, def5678")
    assert found["versions"] == {"python": "3.12.3", "torch": "2.11.0, 2.12.0", "triton": None}


def test_a_report_refuses_runs_that_do_not_belong_together(evaluated_runs, origin, tmp_path):
    from origins import write_origin

    first, *_, last = evaluated_runs
    write_origin(first, replace(origin, machine="2 CPU cores, x86_64"))
    with pytest.raises(ValueError, match=r"several machines \(2 CPU cores, x86_64, NVIDIA H200\); keep them apart"):
        reported(evaluated_runs, tmp_path / "out")
    (first / "origin.json").unlink()
    with pytest.raises(ValueError, match=f"{first.name}: has no origin.json; train it again"):
        reported(evaluated_runs, tmp_path / "out")
    other = last.rename(tmp_path / "hybrid-lr0.1-cosine-seed2")
    with pytest.raises(ValueError, match="hybrid-lr0.1-cosine-seed2: its name is not MODEL-lrRATE-SCHEDULE-seedNUMBER"):
        reported([other], tmp_path / "out")


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
