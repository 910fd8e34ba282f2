"""Run jobs on the ranks of one launch, one after the other: `python -m testing.gpu_curves JOBS.json RESULTS.json`.

JOBS is {name: arguments of testing.jobs.curve}. RESULTS is {name: {"losses", "norms", "graphs"}}. Further arguments of a job add
results:
- `resume`, a folder: the job saves halfway and resumes. Adds "resumed" (losses), "same_parameters" and "same_casts"
  (testing.jobs.same_casts, or null if it does not apply).
- `other`, with `resume`: the second half also runs with these arguments. Adds "otherwise" (losses).
- `setting`: one of testing/gpu_settings.py, under which it runs.
- `rewritten`, with `resume`: arguments of a run that loads the checkpoint and saves it again at once. Adds "different": names of
  tensors whose bits have changed.
- `gradients`, a file: the first step's gradients go there, by true tensor.
- `poisoned`: one gradient is NaN. Adds "unchanged": whether that step was skipped without changing any state.
"""

import faulthandler
import gc
import json
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path

import torch

from megatron_hybrid.distributed.process_groups import leave_groups
from testing import jobs
from testing.gpu_settings import SETTINGS

STUCK_S = 120
"""A job that runs for longer prints where all of its threads are."""


def run(
    steps: int,
    resume: str | None = None,
    other: dict | None = None,
    rewritten: dict | None = None,
    gradients: str | None = None,
    poisoned: bool = False,
    **arguments,
) -> dict:
    result = _curve(steps=steps, **arguments)
    found = {name: result[name] for name in ("losses", "norms", "graphs")}
    if resume:
        half, folder = steps // 2, Path(resume)
        again = _fresh(steps=half, save=str(folder), **arguments)
        rest = _fresh(steps=steps, start=half, load=again["path"], **arguments)
        found["resumed"] = again["losses"] + rest["losses"]
        pairs = [(p, rest["parameters"][name]) for name, p in result["parameters"].items()]
        found["same_casts"] = again["same_casts"]
        found["same_parameters"] = all(torch.equal(a, b) for a, b in pairs)
        if other is not None:
            rest = _fresh(steps=steps, start=half, load=again["path"], **arguments | other)
            found["otherwise"] = again["losses"] + rest["losses"]
        if rewritten is not None:
            options = arguments | rewritten | dict(save=f"{folder} rewritten", load=again["path"])
            found["different"] = jobs.different_tensors(
                again["path"], _fresh(steps=half, start=half, **options)["path"]
            )
    if gradients:
        _reset()
        wanted = {name: arguments[name] for name in ("model", "parallel", "train", "sequence_length", "precision")}
        with _under(arguments.get("setting")):
            torch.save(jobs.first_gradients(**wanted), gradients)
    if poisoned:
        _reset()
        found["unchanged"] = _unchanged(*(arguments[name] for name in ("model", "parallel", "train")))
    return found


def _unchanged(model: dict, parallel: dict, train: dict) -> bool:
    bad = jobs.step_with_bad_gradient(model, parallel, train, float("nan"), 0)
    before, after, later = bad["states"]
    same = [
        torch.equal(value, after[what][name])
        for what in ("parameters", "moments")
        for name, value in before[what].items()
    ]
    moved = [not torch.equal(value, later["moments"][name]) for name, value in before["moments"].items()]
    return all(same) and any(moved) and [reason is None for reason in bad["reasons"]] == [True, False, True]


def _fresh(**arguments) -> dict:
    _reset()
    return _curve(**arguments)


def _curve(setting: str | None = None, **arguments) -> dict:
    with _under(setting):
        return jobs.curve(**arguments)


def _under(setting: str | None) -> AbstractContextManager[None]:
    return SETTINGS[setting]() if setting else nullcontext()


def _reset() -> None:
    """Leave the process groups and what the engine before left on the GPU; the launch stays."""
    leave_groups()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        if find_spec("transformer_engine"):
            from transformer_engine.pytorch.quantization import FP8GlobalStateManager

            FP8GlobalStateManager.reset()  # its amax buffers


def _gpu_memory() -> str:
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    return f", {(total - free) / 2**30:.1f} GiB of the GPU in use"


def main() -> None:
    todo, results = json.loads(Path(sys.argv[1]).read_text()), {}
    for name, arguments in todo.items():
        if results:
            _reset()
        started = time.monotonic()
        faulthandler.dump_traceback_later(STUCK_S)
        results[name] = run(**arguments)
        faulthandler.cancel_dump_traceback_later()
        print(f"{name}: {time.monotonic() - started:.1f} s{_gpu_memory()}", file=sys.stderr, flush=True)
        if torch.distributed.get_rank() == 0:
            Path(sys.argv[2]).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
