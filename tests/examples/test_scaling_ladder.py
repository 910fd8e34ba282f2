"""The ladder of examples/scaling: its models and hyperparameters, its points, its report, and a whole small ladder on the CPU."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.arch.flops import count_parameters
from megatron_hybrid.base.errors import REQUEUE, UserError
from megatron_hybrid.train.schedules import learning_rate
from tests.data.files import write_indexed


@pytest.fixture
def ladder(root):
    folders = [str(root / "examples" / "scaling"), str(root / "examples"), str(root / "benchmarks")]
    sys.path[:0] = folders
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        import ladder

        yield ladder
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        del sys.path[: len(folders)]


@pytest.fixture
def origin(ladder):
    from origins import Origin

    return Origin("abc1234", "2 CPU cores, x86_64", {"python": "3.12.3"})


@pytest.mark.parametrize("key_head_dim", [64, 128])
def test_architectures_of_a_size_have_equal_parameters(ladder, key_head_dim):
    import shapes

    counts = []
    for size in shapes.SIZES:
        models = {name: shapes.make_model(size, name, 16384, key_head_dim) for name in shapes.ARCHITECTURES}
        bodies = {name: shapes.body_parameters(model) for name, model in models.items()}
        goal = bodies["transformer"]
        assert all(abs(body / goal - 1) <= shapes.TOLERANCE for body in bodies.values()), (str(size), bodies)
        ends = {count_parameters(models[name]) - bodies[name] for name in models}
        assert ends == {2 * 16384 * size.hidden}, "N leaves out the embedding and the output layer"
        assert {model.num_layers for model in models.values()} == {size.layers}
        assert models["hybrid"].layers == ("G", "G", "G", "A") * (size.layers // 4)
        assert set(models["gdn"].layers) == {"G"} and set(models["transformer"].layers) == {"A"}
        gdn = models["hybrid"].gdn
        assert (gdn.key_head_dim, gdn.value_head_dim) == (key_head_dim, 2 * key_head_dim), (
            "sizes for which there are kernels"
        )
        counts.append(goal)
    with pytest.raises(
        UserError, match="--key-head-dim: 128: the hybrid of size 4/1/4 .*; give narrower keys or a larger size"
    ):
        shapes.make_model(shapes.Size.parse("4/1/4"), "hybrid", 256)
    assert counts == sorted(counts) and counts[0] > 3e6 and counts[-1] < 60e6 and len(counts) >= 4


def test_hyperparameters_follow_the_papers_formulas(ladder):
    import shapes

    plan = shapes.make_plan(108_000_000, (2.0, 0.5, 1.0), 2048)
    assert (plan.batch, plan.learning_rate, plan.tokens_per_step) == (160, 0.00235, 327_680)
    assert plan.warmup_steps == 330 and plan.endpoints == (3296, 6592, 13184), "N and 10 N, 20 N, 40 N tokens"
    small = shapes.make_plan(13_500_000, (1.0,), 2048)  # an eighth of the size: a quarter of the batch, twice the rate
    assert small.batch == 40 and small.learning_rate == pytest.approx(0.0047)
    assert plan.batch % plan.micro_batch == 0 and plan.micro_batch == 40 and small.micro_batch == 40


def test_runs_of_a_size_differ_in_the_model_alone(ladder, tmp_path):
    size, budgets = ladder.Size.parse("384/6/8"), (0.5, 1, 2)
    runs = list(ladder.ladder([size], ladder.ARCHITECTURES, budgets, tmp_path, tmp_path / "runs"))
    configs = [run.config.model_dump(exclude={"model", "run_dir"}) for run in runs]
    assert configs[0] == configs[1] == configs[2]
    train = runs[0].config.train
    assert train.schedule.kind == "wsd_s" and (*train.schedule.endpoints, train.steps) == runs[0].plan.endpoints
    assert (train.schedule.decay_fraction, train.schedule.min_lr_ratio, train.eval_batches) == (0.05, 0.0, None)
    last = runs[1].plan.endpoints[-1]
    assert runs[1].tokens_at(last) == pytest.approx(2 * 20 * runs[0].parameters, rel=1e-3)
    assert runs[1].flops_at(last) > 6 * runs[1].parameters * runs[1].tokens_at(last)


def test_larger_budgets_extend_a_finished_run(ladder, tmp_path):
    """Up to its end, a run has the learning rates and endpoints that it has with larger budgets."""
    size = [ladder.Size.parse("256/4/4")]
    short, long = (
        next(ladder.ladder(size, ["gdn"], budgets, tmp_path, tmp_path)) for budgets in ((0.5, 1), (0.5, 1, 2))
    )
    assert short.folder == long.folder and long.plan.endpoints[:2] == short.plan.endpoints
    steps = range(1, short.plan.endpoints[-1] + 1)
    rates = [[learning_rate(step, run.config.train) for step in steps] for run in (short, long)]
    assert rates[0] == rates[1] and rates[0][-1] == 0


def test_the_list_shows_all_runs(ladder, tmp_path, capsys):
    words = ["--budgets", "1", "--sizes", "384/6/8", "256/4/4", "--tflops", "50"]
    assert ladder.main(["--list", "--data", str(tmp_path), *words]) == 0
    head, *lines, total = capsys.readouterr().out.splitlines()
    smallest = [f"{name}-256-4-4" for name in ("transformer", "hybrid", "gdn")]
    assert [line.split()[0] for line in lines[:3]] == smallest
    assert len(lines) == 6 and "epochs" in head
    flops, hours = (sum(float(line.split()[column]) for line in lines) for column in (-2, -1))
    assert total.startswith("6 runs") and hours == pytest.approx(flops / 50e12 / 3600, abs=0.03)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--sizes", "384-6-8"], "--sizes: 384-6-8 is not hidden size, heads and layers; write 384/6/8"),
        (["--sizes", "384/6/6"], "the hybrid needs a multiple of 4 layers"),
        (["--sizes", "384/5/8"], "384 does not divide into 5 heads"),
        (["--budgets", "1", "1"], "--budgets: .*give distinct positive multiples"),
        (["--key-head-dim", "1024", "--sizes", "256/4/4"], "--key-head-dim: 1024: the hybrid .*; give narrower keys"),
        (["--budgets", "0.01"], "--budgets: 0.01 ends after .* steps, in the warm-up"),
    ],
)
def test_wrong_arguments_name_the_option(ladder, tmp_path, capsys, words, error):
    with pytest.raises(SystemExit) as raised:
        ladder.main(["--list", "--data", str(tmp_path), *words])
    assert raised.value.code == 78
    assert re.search(error, capsys.readouterr().err)


def test_points_are_the_endpoints_that_were_evaluated(ladder, tmp_path):
    import points

    files = {"eval/files/loss": 3.0, "eval/files/bits_per_byte": 1.0}
    packages = {"eval/packages/loss": 4.0, "eval/packages/bits_per_byte": 2.0}
    lines = [
        {"step": 1, "loss": 9.0},
        {"step": 5, **files, **packages},
        {"step": 7, "eval/files/loss": 2.0},
        {"step": 10, "loss": 1.0},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = points.read_endpoints(path, (5, 10))
    assert found == {5: {"losses": {"files": 3.0, "packages": 4.0}, "bits_per_byte": {"files": 1.0, "packages": 2.0}}}
    common = dict(size="8/1/4", budget=1.0, parameters=1, tokens=2, flops=3, epochs=None)
    point = points.Point(architecture="gdn", **common, **found[5])
    assert point.loss == 3.5 and point.mean_bits_per_byte == 1.5
    (tmp_path / "run").mkdir()
    points.write_points(tmp_path / "run" / "points.json", [point])
    assert points.read_points(tmp_path) == [point]
    (tmp_path / "run" / "points.json").write_text('[{"size": 1}]')
    with pytest.raises(UserError, match="is no list of points .*; run ladder.py again"):
        points.read_points(tmp_path)


def test_the_fit_wants_to_know_where_runs_trained(ladder, tmp_path, capsys):
    import fit
    import points

    (tmp_path / "run").mkdir()
    points.write_points(tmp_path / "run" / "points.json", list(paper_points(0.0)))
    with pytest.raises(SystemExit):
        fit.main(["--runs", str(tmp_path)])
    assert re.search(r"--runs: .*/run: has no origin.json; train it again", capsys.readouterr().err)


def paper_points(noise: float):
    """Points of a ladder whose losses are those of the paper's laws."""
    import law
    import points
    import shapes

    random = np.random.default_rng(0)
    for name in shapes.ARCHITECTURES:
        for size in shapes.SIZES:
            n = shapes.body_parameters(shapes.make_model(size, name, 16384))
            for budget in (0.5, 1.0, 2.0, 4.0):
                loss = float(law.PAPER[name].loss(n, 20 * n * budget) * np.exp(noise * random.standard_normal()))
                common = dict(epochs=5.0, losses={"files": loss}, bits_per_byte={})
                tokens = round(20 * n * budget)
                yield points.Point(name, str(size), budget, n, tokens, flops=6 * n * tokens, **common)


def test_the_report_holds_the_laws_and_draws_the_figure(ladder, origin, tmp_path):
    import fit
    import law
    import scaling_page

    fit.write(list(paper_points(1e-4)), origin, 20, tmp_path, min_budget=0.5)
    found = json.loads((tmp_path / "scaling-cpu.json").read_text())
    assert found["command"] == (
        "bash examples/scaling/run.sh --sizes 256/4/4 320/5/4 384/6/4 384/6/8 512/8/8 640/10/8 --budgets 0.5 1 2 4"
        " && python examples/scaling/fit.py --min-budget 0.5"
    )
    values = scaling_page.values_of(found)
    beta = values["hybrid, fitted exponents"]
    assert beta["beta"]["ours"] == pytest.approx(0.219, rel=0.05) and beta["beta"]["peer"] == 0.219
    assert beta["beta, low"]["ours"] < beta["beta"]["ours"] < beta["beta, high"]["ours"]
    saving = beta["token saving at N = 7000000000"]
    laws = law.PAPER["transformer"], law.PAPER["hybrid"]
    assert saving["ours"] == pytest.approx(law.token_savings(*laws, 7e9, 140e9), rel=0.15) and saving["peer"] == 1.68
    assert any("72 of 72 points have read the training data more than 4 times" in note for note in found["notes"])
    assert (tmp_path / "scaling.svg").read_text().count("<path") > 50
    again = (tmp_path / "scaling.svg").read_bytes()
    scaling_page.draw(found, tmp_path)
    assert (tmp_path / "scaling.svg").read_bytes() == again


def test_early_endpoints_can_be_left_out_of_the_laws(ladder):
    """A point that ends in the warm-up is far above any law, and would move its constants."""
    import fit

    late = list(paper_points(1e-3))
    early = [replace(p, budget=0.25, tokens=p.tokens // 2, losses={"files": 9.0}) for p in late if p.budget == 0.5]
    expected, _ = fit.analyse(late, 5)
    rows, notes = fit.analyse([*early, *late], 5, min_budget=0.5)
    laws, of_late = (
        [row for row in of if "exponents" in row["case"] or "alpha" in row["case"]] for of in (rows, expected)
    )
    assert laws == of_late and len(laws) > 50
    assert "the laws leave out 18 of 90 points, whose budgets are below 0.5" in notes
    assert any(row["case"].endswith("0.25x") for row in rows), "the points are still listed"
    moved, _ = fit.analyse([*early, *late], 5)
    assert [row for row in moved if row["metric"] == "beta"] != [row for row in rows if row["metric"] == "beta"]


def test_the_command_names_the_budgets_of_each_size(ladder):
    import fit

    points = [p for p in paper_points(0.0) if p.size in ("256/4/4", "320/5/4") or (p.size, p.budget) == ("384/6/4", 1)]
    assert list(fit.ladders(points)) == [
        "bash examples/scaling/run.sh --sizes 256/4/4 320/5/4 --budgets 0.5 1 2 4",
        "bash examples/scaling/run.sh --sizes 384/6/4 --budgets 1",
    ]


def test_points_that_follow_no_law_have_wide_intervals_and_no_infinite_values(ladder):
    import fit

    rows, _ = fit.analyse(list(paper_points(0.5)), 10)
    rows = [row for row in rows if row["metric"] != "bits per byte" and "interpolated" not in row["case"]]
    values = {(row["case"], row["metric"]): row["ours"] for row in rows}
    assert all(value is not None and np.isfinite(value) for value in values.values())
    case = "hybrid, fitted exponents"
    assert values[case, "E, high"] > 1.5 * values[case, "E, low"]


def test_the_page_says_what_was_not_run_and_shows_what_was(ladder, origin, tmp_path, monkeypatch):
    import figures
    import fit
    import pages
    import scaling_page

    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    names = ("points", "laws", "optimal", "savings", "interpolated", "corpus")
    tables = [getattr(scaling_page, name) for name in names]
    assert {table(figures.table) for table in tables} == {"Not run yet.\n"}
    fit.write(list(paper_points(1e-4)), origin, 20, tmp_path)
    points, laws, optimal, savings, interpolated, _ = (table(figures.table) for table in tables)
    assert points.count("\n| ") == 1 + 24 and "scaling.svg" in points
    assert "| hybrid 3:1 | fitted exponents |" in laws and "(83.65)" in laws and "| fixed |" in laws
    assert "1e18 FLOPs" in optimal and "(3.46)" in optimal and "(1.68)" in savings and "N = 70B" in savings
    assert interpolated.count("\n| hybrid 3:1 |") == 6 and "| files |" in interpolated


def test_the_measured_ladder_is_in_the_result_file(ladder, root):
    """The result file has the points of benchmarks/measured/scaling, and the savings that follow from them."""
    import fit
    import points
    import scaling_page

    found = points.read_points(root / "benchmarks" / "measured" / "scaling")
    assert len(found) == 48
    values = scaling_page.values_of(scaling_page.result())
    for row in (*fit.point_rows(found), *fit.interpolated_rows(found)):
        assert values[row["case"]][row["metric"]] == row


def test_wider_keys_are_compared_at_equal_sizes_and_budgets(ladder):
    import scaling_keys

    baseline = list(paper_points(0.0))
    wider = [
        replace(p, losses={"files": p.loss - 0.1 * (p.architecture == "hybrid")}) for p in baseline if p.budget <= 2
    ]
    rows = list(scaling_keys.rows_of(baseline, wider))
    losses = [row for row in rows if row["metric"] == "loss"]
    assert len(losses) == 54, "three budgets that both ladders have"
    for row in losses:
        assert row["peer"] - row["ours"] == pytest.approx(0.1 * row["case"].startswith("hybrid"), abs=2e-3)
    savings = [row for row in rows if row["metric"] == "token saving at 2x"]
    assert [row["case"].split(",")[0] for row in savings] == 6 * ["hybrid"] + 6 * ["gdn"]
    assert all(row["ours"] > row["peer"] > 1 for row in savings[:6])
    assert all(row["ours"] == row["peer"] for row in savings[6:]), "only the hybrid has changed"
    with pytest.raises(ValueError, match="no architecture, size and budget in common; train the same ones in both"):
        list(scaling_keys.rows_of([p for p in baseline if p.budget > 2], wider))


@pytest.mark.parametrize(
    ("words", "corpus", "fit"),
    [
        (["--gpus", "1"], [], []),
        (["--runs", "a b", "--data=c", "--gpus", "1"], ["--output", "c"], ["--runs", "a b"]),
        (["--runs=a", "--data", "c", "train.steps=1"], ["--output", "c"], ["--runs", "a"]),
    ],
)
def test_the_command_hands_its_folders_to_all_three_steps(root, tmp_path, words, corpus, fit):
    """With --runs elsewhere, the law was fitted to runs/scaling."""
    folder = tmp_path / "examples" / "scaling"
    folder.mkdir(parents=True)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "env.sh").write_text(f'python() {{ {sys.executable} "$@"; }}\n')
    shutil.copy(root / "examples" / "scaling" / "run.sh", folder)
    for name in ("corpus", "ladder", "fit"):
        (folder / f"{name}.py").write_text("import json, sys\nprint(json.dumps(sys.argv))\n")
    done = subprocess.run(["bash", folder / "run.sh", *words], capture_output=True, text=True, check=True)
    calls = [[Path(name).stem, *rest] for name, *rest in map(json.loads, done.stdout.splitlines())]
    assert calls == [["corpus", *corpus], ["ladder", *words], ["fit", *fit]]


SHAPES = ("--sizes", "16/1/4", "24/1/4", "--key-head-dim", "16")
TINY = (*SHAPES, "--architectures", "transformer", "hybrid", "--budgets", "0.1", "0.2")


def documents(count: int) -> list[list[int]]:
    """Texts of few words as bytes, which a tiny model can learn."""
    random, words = np.random.default_rng(0), [b"def ", b"return ", b"self.", b"value", b"(x)", b":\n    ", b" + "]
    return [[*b"".join(words[i] for i in random.integers(len(words), size=60)), 256] for _ in range(count)]


@pytest.fixture
def tiny(tmp_path):
    """Arguments of a ladder of two sizes, two architectures and two budgets, with data of bytes."""
    (tmp_path / "data").mkdir()
    for name, count in (("train", 600), ("files", 4), ("packages", 4)):
        write_indexed(tmp_path / "data" / name, documents(count))
    fields = ["model.vocab_size=257", "data.tokenizer=byte", "data.sequence_length=32", "train.dtype=fp32"]
    fields += ["logging.interval=1"]
    return [*TINY, "--runs-per-gpu", "2", "--data", str(tmp_path / "data"), "--runs", str(tmp_path / "runs"), *fields]


def wait_for_steps(folder, steps: int, timeout: float = 200) -> None:
    """Wait until a run in the folder has that many steps."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if any(path.read_text().count("\n") >= steps for path in folder.glob("*/metrics.jsonl")):
            return
        time.sleep(0.2)
    raise TimeoutError(f"no run in {folder} has {steps} steps after {timeout} s")


@pytest.mark.slow
@pytest.mark.timeout(900)  # it takes a minute of CPU time in six processes that start one after the other
def test_a_small_ladder_is_interrupted_resumed_and_fitted(ladder, root, tiny, tmp_path):
    command = [sys.executable, root / "examples" / "scaling" / "ladder.py", *tiny]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_for_steps(tmp_path / "runs", 5)
    finally:
        first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=120) == REQUEUE
    assert list((tmp_path / "runs").glob("*/checkpoints/step-*"))
    assert ladder.main(tiny) == 0
    import fit
    import points

    found = points.read_points(tmp_path / "runs")
    expected = product(("hybrid", "transformer"), ("16/1/4", "24/1/4"), (0.1, 0.2))
    assert [(p.architecture, p.size, p.budget) for p in found] == list(expected)
    by_name = {(p.architecture, p.size, p.budget): p for p in found}
    for (name, size, _), point in by_name.items():
        assert by_name[name, size, 0.2].loss < by_name[name, size, 0.1].loss < np.log(257)
        assert point.losses.keys() == {"files", "packages"}
        assert point.mean_bits_per_byte == pytest.approx(point.loss / np.log(2), rel=0.02), "a token is a byte"
        assert point.tokens == by_name["transformer", size, point.budget].tokens, "equal data"
    _check_rates(tmp_path / "runs" / "hybrid-16-1-4" / "metrics.jsonl")
    assert fit.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--resamples", "20"]) == 0
    result = json.loads((tmp_path / "out" / "scaling-cpu.json").read_text())
    cases = {row["case"] for row in result["rows"]}
    assert "hybrid, alpha = 0.22, beta = 0.22" in cases and "hybrid, fitted exponents" not in cases
    assert any("4 points cannot determine 5 constants" in note for note in result["notes"])
    assert (tmp_path / "out" / "scaling.svg").stat().st_size > 10_000


def _check_rates(path) -> None:
    """Every step is there once, and the learning rate is 0 at both endpoints and at its peak after the first."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    ends = [line["step"] for line in lines if "eval/files/loss" in line]
    rates = {line["step"]: line["lr"] for line in lines}
    assert len(ends) == 2 and ends[-1] == len(lines) and rates[ends[0]] == rates[ends[1]] == 0
    assert rates[ends[0] + 1] == max(rates.values())
