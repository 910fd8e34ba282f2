"""What tools/tune_parallelism.py does with its arguments."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.command_line import check_output_file
from megatron_hybrid.config.load import dump_run
from megatron_hybrid.planner import measured, plot, report
from megatron_hybrid.planner.emit import base_run, emitted
from megatron_hybrid.planner.hardware import load
from megatron_hybrid.planner.search import Answer, Job, search

MOST_GPUS = 1 << 20


@dataclass(frozen=True)
class Question:
    """The arguments, by their names on the command line."""

    model: str
    gpus: int
    gpu: str = "h100-80gb"
    sequence_length: int | None = None
    global_batch_size: int | None = None
    precision: str | None = None
    gpus_per_node: int | None = None
    recompute: str = "auto"
    top: int = 10
    json: bool = False
    why: Sequence[str] = ()
    emit: Path | None = None
    plot: Path | None = None
    hardware: str | None = None
    calibration: Path | None = None
    measure: int = 0


def answer(question: Question) -> str:
    """What to print; files asked for are written.

    Raises:
        ConfigError, UserError: what is wrong with the question, or with a run that was to be measured.
    """
    _check(question)
    hardware = load(question.hardware or question.gpu)
    if question.gpus_per_node:
        hardware = replace(hardware, gpus_per_node=question.gpus_per_node)
    runs = measured.read_calibration(question.calibration, hardware) if question.calibration else []
    run = base_run(question.model, question.sequence_length, question.global_batch_size, question.precision)
    job = Job.of(run, question.gpus, hardware, question.recompute)
    texts = []
    plain = search(job)
    found = _calibrated(job, runs) if runs else plain
    if question.measure:
        measured.check_devices_here(hardware, question.gpus)
        chosen = {c.plan.label for c in found.candidates[: question.measure]}
        # the factors are fitted to predictions without any
        fresh = [measured.measure(run, c) for c in _by_label(plain, chosen)]
        runs = [old for old in runs if old["layout"] not in chosen or old.get("gpus") != job.gpus] + fresh
        factors = measured.fitted(runs)
        if question.calibration:
            measured.write_calibration(question.calibration, hardware, runs)
        texts.append(measured.comparison(fresh, factors))
        found = _calibrated(job, runs)
    return "\n\n".join([*texts, _say(question, found, run)])


def _check(question: Question) -> None:
    """Check numbers, and that results can be written, before the search."""
    for name in ("gpus", "top", "gpus_per_node", "sequence_length", "global_batch_size"):
        value = getattr(question, name)
        if value is not None and value < 1:
            raise ConfigError.at(name, f"{value} is not a positive number; give at least 1")
    if question.gpus > MOST_GPUS:
        raise ConfigError.at("gpus", f"{question.gpus} is more than the planner enumerates; give at most {MOST_GPUS}")
    if question.measure < 0:
        raise ConfigError.at("measure", f"{question.measure} is negative; give the number of layouts to measure")
    for name in ("emit", "plot") + (("calibration",) if question.measure else ()):
        check_output_file(name, getattr(question, name))
    if question.plot:
        plot.check_format(question.plot)
    if question.calibration and not question.measure and not question.calibration.exists():
        raise ConfigError.at("calibration", f"{question.calibration}: no such file; make it with --measure")


def _say(question: Question, found: Answer, run) -> str:
    if (question.emit or question.plot) and not found.candidates:
        raise ConfigError.at("gpus", f"{question.gpus}: no layout fits\n" + "\n".join(report.summary(found.rejections)))
    if question.emit:
        question.emit.write_text(dump_run(emitted(run, found.candidates[0].plan)), encoding="utf-8")
    if question.plot:
        plot.draw(found, question.plot)
    if question.json:
        return json.dumps(report.as_json(found, question.top), indent=1)
    texts = [report.why(found, condition) for condition in question.why]
    if not texts:
        texts = [report.table(found, question.top)]
        texts += [report.detail(found.candidates[0], found.job)] if found.candidates else []
    return "\n\n".join(texts)


def _calibrated(job: Job, runs: Sequence[dict]) -> Answer:
    return search(replace(job, hardware=job.hardware.calibrated(measured.fitted(runs))))


def _by_label(answer: Answer, labels: set[str]):
    return [candidate for candidate in answer.candidates if candidate.plan.label in labels]
