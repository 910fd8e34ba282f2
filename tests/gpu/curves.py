"""Runs jobs on the ranks of one launch, one after the other: python -m tests.gpu.curves JOBS.json RESULTS.json

JOBS: {name: arguments of tests.jobs.curve}. RESULTS: {name: {"losses", "norms"}}; of a job with `resume` (a folder), which saves
halfway and is built anew, also "resumed" (losses), "same_parameters" and "same_casts" (tests.jobs.same_casts; null where it does
not apply); with `other_precision` as well, also "otherwise": the losses where the second half runs in that.
"""

import gc
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from megatron.core import parallel_state

from tests import jobs


def run(steps: int, resume: str | None = None, other_precision: dict | None = None, **arguments) -> dict:
    result = jobs.curve(steps=steps, **arguments)
    found = {"losses": result["losses"], "norms": result["norms"]}
    if resume:
        half, folder = steps // 2, Path(resume)
        again = _fresh(steps=half, save=str(folder), **arguments)
        rest = _fresh(steps=steps, start=half, load=again["path"], **arguments)
        found["resumed"] = again["losses"] + rest["losses"]
        pairs = [(p, rest["parameters"][name]) for name, p in result["parameters"].items()]
        found["same_casts"] = again["same_casts"]
        found["same_parameters"] = all(torch.equal(a, b) for a, b in pairs)
        if other_precision is not None:
            other = arguments | {"precision": other_precision}
            found["otherwise"] = (
                again["losses"] + _fresh(steps=steps, start=half, load=again["path"], **other)["losses"]
            )
    return found


def _fresh(**arguments) -> dict:
    _reset()
    return jobs.curve(**arguments)


def _reset() -> None:
    """Leave the process groups and what the engine before left on the GPU; the launch stays."""
    parallel_state.destroy_model_parallel()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        if find_spec("transformer_engine"):
            from transformer_engine.pytorch.quantization import FP8GlobalStateManager

            FP8GlobalStateManager.reset()  # its amax buffers


def main() -> None:
    todo, results = json.loads(Path(sys.argv[1]).read_text()), {}
    for name, arguments in todo.items():
        if results:
            _reset()
        results[name] = run(**arguments)
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
