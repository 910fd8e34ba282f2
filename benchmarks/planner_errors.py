"""Compare the planner's predictions with what planner_memory.py measured.

Memory of every layout, step time before and after calibration, and the ranking of one job's layouts. Factors are fitted to the cases
that are not held out.

python benchmarks/planner_errors.py benchmarks/measured/planner-H200.json [--hardware FILE]
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from report import bounded, row, write  # noqa: E402

from megatron_hybrid.arch.documents import ASSUMED_LENGTH  # noqa: E402
from megatron_hybrid.config.presets import expand  # noqa: E402
from megatron_hybrid.config.renames import rename_saved  # noqa: E402
from megatron_hybrid.config.run import RunConfig  # noqa: E402
from megatron_hybrid.planner.calibration import Measured, fit_factors, predict  # noqa: E402
from megatron_hybrid.planner.hardware import Hardware, load  # noqa: E402
from megatron_hybrid.planner.memory import fullest  # noqa: E402
from megatron_hybrid.planner.plan import Plan  # noqa: E402
from megatron_hybrid.planner.search import device_bytes  # noqa: E402

MEMORY_GOALS, TIME_GOALS, BIAS_GOAL = (0.05, 0.10), (0.20, 0.10), 0.03


def plan_of(case: dict, document_length: float = ASSUMED_LENGTH) -> Plan:
    """Return the plan of a case. Documents have `document_length` tokens on average, if they are separated."""
    saved = rename_saved(case["config"])
    config = RunConfig.model_validate(saved | {"model": expand(saved["model"])})
    return Plan.of(config, case["world"], document_length)


def predicted(case: dict, hardware: Hardware) -> dict:
    """Return a measured case with its plan and predicted memory."""
    plan = plan_of(case)
    memory = fullest(plan)
    return case | {"plan": plan, "memory": memory.total, "device": device_bytes(memory, hardware)}


def measured(cases: list[dict]) -> list[Measured]:
    """Return the measured steps of cases."""
    return [Measured(case["plan"], case["seconds"], case["peak_bytes"]) for case in cases]


def by_layer(case: dict) -> None:
    """Print what each layer saved, measured and predicted."""
    from megatron_hybrid.planner.activations import layer_bytes

    if not case.get("saved_by_layer"):
        return
    plan = case["plan"]
    _, *layers, head = case["saved_by_layer"]
    for symbol, shard in plan.shards.items():
        table = layer_bytes(shard, plan.parallel.recompute_granularity).saved
        seen = [size / plan.tokens for size, s in zip(layers, plan.model.layers) if s == symbol]
        print(
            f"    {symbol}: {mean(seen):,.0f} bytes per token (from {min(seen):,.0f} to {max(seen):,.0f}), table {table:,.0f}"
        )
    print(f"    head: {head / 1e9:.3f} GB; resting {case['resting_bytes'] / 1e9:.3f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path)
    parser.add_argument("--hardware", help="hardware file; default: the one of the measured device")
    arguments, _ = parser.parse_known_args()
    data = json.loads(arguments.measured.read_text())
    hardware = load(arguments.hardware or ("h200" if "H200" in data["device"] else "h100-80gb"))
    everything = [predicted(case, hardware) for case in data["cases"]]
    cases = [case for case in everything if "seconds" in case]
    factors = fit_factors(measured([case for case in cases if not case["held_out"]]), hardware)
    predictions = predict(measured(cases), hardware), predict(measured(cases), hardware.calibrated(factors))
    print("factors:", {name: round(x, 3) for name, x in factors.items()})
    rows, memory, before, calibrated = [], [], [], []
    for case, *times in zip(cases, *predictions, strict=True):
        held = " (held out)" if case["held_out"] else ""
        errors = [case["memory"] / case["peak_bytes"] - 1, *(x / case["seconds"] - 1 for x in times)]
        memory.append((case["held_out"], errors[0]))
        before.append((case["held_out"], errors[1]))
        calibrated.append((case["held_out"], errors[2]))
        rows.append(
            row(f"{case['case']}{held}", "memory", "GB", case["memory"] / 1e9, case["peak_bytes"] / 1e9, "measured")
        )
        for name, seconds in zip(("step", "step, calibrated"), times):
            rows.append(row(f"{case['case']}{held}", name, "s", seconds, case["seconds"], "measured"))
        print(f"{case['case']}{held}: memory {errors[0]:+.1%}, step {errors[1]:+.1%}, calibrated {errors[2]:+.1%}")
        by_layer(case)
    for name, errors, goals in (
        ("memory", memory, MEMORY_GOALS),
        ("step", before, (None, TIME_GOALS[0])),
        ("step, calibrated", calibrated, (None, TIME_GOALS[1])),
    ):
        for which, some in (("all", errors), ("held out", [e for e in errors if e[0]])):
            sizes = [abs(error) for _, error in some]
            rows.append(bounded(f"{name}, {which} ({len(sizes)})", "mean error", "share", mean(sizes), goals[0]))
            rows.append(bounded(f"{name}, {which} ({len(sizes)})", "worst error", "share", max(sizes), goals[1]))
    for name, errors in (("step", before), ("step, calibrated", calibrated)):
        if several := [error for case, (_, error) in zip(cases, errors, strict=True) if case["world"] > 1]:
            which, metric = f"{name}, several GPUs ({len(several)})", "size of the mean error, with signs"
            rows.append(bounded(which, metric, "share", abs(mean(several)), BIAS_GOAL))
    wrong = [c for c in everything if c.get("out_of_memory") and c["device"] <= hardware.memory_bytes]
    rows.append(bounded("every case", "said to fit, and ran out of memory", "cases", len(wrong), 0))
    rows += ranking(cases, *predictions)
    for line in rows[3 * len(cases) :]:
        print(line["case"], line["metric"], line["ours"], "goal", line["goal"], "met", line["met"])
    sys.argv[0] = "planner_errors.py"
    notes = [
        f"Measured {data['date']} by benchmarks/planner_memory.py at {data['commit']}; rates: {hardware.measured}."
    ]
    worst = max(zip(cases, before, strict=True), key=lambda pair: abs(pair[1][1]))
    notes.append(f"Worst step time before calibration: {worst[0]['case']}, {worst[1][1]:+.1%}.")
    notes += [f"Said to fit, and ran out of memory: {case['case']}; why is not known yet." for case in wrong]
    of_runs: dict[str, list[str]] = {}  # other runs than the first one
    for case in cases:
        if "measured" in case:
            of_runs.setdefault(case["measured"], []).append(case["case"])
    notes += [f"Measured {run}: {'; '.join(names)}." for run, names in of_runs.items()]
    write("planner_errors", rows, ("torch",), machine=data["device"], notes=notes, printed=len(rows))


def ranking(cases: list[dict], before: list[float], after: list[float]) -> list[dict]:
    """Return the place of the measured best among the predictions, for the layouts of one job."""
    job = [i for i, case in enumerate(cases) if case["case"].startswith("7B")]
    if len(job) < 3:
        return []
    best = min(job, key=lambda i: cases[i]["seconds"])
    return [
        bounded(f"7B on two GPUs, {len(job)} layouts, {when}", "predicted place of the measured best", "place",
                sorted(job, key=seconds.__getitem__).index(best) + 1, 3)
        for when, seconds in (("before calibration", before), ("after calibration", after))
    ]  # fmt: skip


if __name__ == "__main__":
    main()
