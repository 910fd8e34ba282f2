"""Record the layouts that the planner ranks first for OLMo Hybrid 7B, 4 Mi tokens per step. Nothing is measured.

python benchmarks/planned_layouts.py
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from report import row, write  # noqa: E402

from megatron_hybrid.config.precision import PrecisionConfig  # noqa: E402
from megatron_hybrid.config.presets import olmo_hybrid_7b  # noqa: E402
from megatron_hybrid.planner.hardware import Hardware, load  # noqa: E402
from megatron_hybrid.planner.job import Job  # noqa: E402
from megatron_hybrid.planner.search import Candidate, search  # noqa: E402

TOKENS = 4 << 20
FORMATS = {"bf16": None, "FP8 tensorwise": "tensorwise"}
LONG = 65536


@dataclass(frozen=True)
class Question:
    """GPUs and a sequence length."""

    gpu: str
    gpus: int
    sequence: int


QUESTIONS = [
    *(Question("h100-80gb", gpus, sequence) for sequence in (8192, LONG) for gpus in (8, 64, 512)),
    *(Question("h200", 8, sequence) for sequence in (8192, LONG)),
]


def best(question: Question, hardware: Hardware, recipe: str | None) -> Iterator[tuple[str, Candidate]]:
    """Yield the first candidate; of long sequences also the first without context parallelism, with what sets it apart."""
    precision = PrecisionConfig(fp8_recipe=recipe)
    sequences = TOKENS // question.sequence
    job = Job(olmo_hybrid_7b(), question.gpus, hardware, question.sequence, sequences, precision=precision)
    found = search(job).candidates
    yield "", found[0]
    if question.sequence == LONG:
        yield " without CP", next(candidate for candidate in found if candidate.plan.cp == 1)


def main() -> None:
    rows = []
    for question in QUESTIONS:
        hardware = load(question.gpu)
        for form, recipe in FORMATS.items():
            for without, candidate in best(question, hardware, recipe):
                case = f"{question.gpus} x {hardware.name}, {question.sequence:,} tokens{without}, {form}"
                rows += [
                    row(
                        case, candidate.plan.label, "tokens/s/GPU", candidate.step.tokens_per_gpu, higher_is_better=True
                    ),
                    row(case, "peak of all tensors", "GB", candidate.memory.total / 1e9),
                ]
    write("planned_layouts", rows, machine="predicted", notes=["Predictions. No layout of this table was run."])


if __name__ == "__main__":
    main()
