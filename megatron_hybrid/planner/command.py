"""Command of megatron-hybrid plan: search, measure, and write or print the result."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_hybrid.arch.documents import ASSUMED_LENGTH
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.command_line import check_output_file
from megatron_hybrid.config.load import dump_run
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.planner import calibration_file, measure, plot, report
from megatron_hybrid.planner.calibration import Measured, Run, fit_factors, format_comparison
from megatron_hybrid.planner.emit import apply_plan, comment, load_base_run
from megatron_hybrid.planner.hardware import load
from megatron_hybrid.planner.job import Job
from megatron_hybrid.planner.search import SearchResult, search

MOST_GPUS = 1 << 20


@dataclass(frozen=True)
class Request:
    """Arguments, by their names on the command line."""

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
    documents: str | None = None
    document_length: int | None = None


def answer(request: Request) -> str:
    """Search, write the files that are asked for, and return the text to print.

    Raises:
        ConfigError: the request is wrong.
        UserError: a run that was to be measured failed.
    """
    _check(request)
    hardware = load(request.hardware or request.gpu)
    if request.gpus_per_node:
        hardware = replace(hardware, gpus_per_node=request.gpus_per_node)
    runs = calibration_file.read_calibration(request.calibration, hardware) if request.calibration else []
    run = load_base_run(
        request.model, request.sequence_length, request.global_batch_size, request.precision, request.documents
    )
    if request.document_length is not None and run.data.documents == "keep":
        raise ConfigError.at(
            "document_length", "data.documents is keep; give --documents mask or pack, or leave it out"
        )
    if request.measure and run.data.documents != "keep":
        raise ConfigError.at(
            "measure",
            f"data.documents is {run.data.documents}, and steps are measured on random tokens without documents; give --documents "
            "keep, or leave it out",
        )
    job = Job.of(run, request.gpus, hardware, request.recompute, request.document_length or ASSUMED_LENGTH)
    found, texts = _calibrated(job, runs) if runs else search(job), []
    if request.measure:
        measure.check_local_devices(hardware, request.gpus)
        fresh = [measure.measure(run, candidate) for candidate in found.candidates[: request.measure]]
        runs = calibration_file.add_runs(runs, fresh)
        if request.calibration:
            calibration_file.write_calibration(request.calibration, hardware, runs)
        found = _calibrated(job, runs)
        texts.append(format_comparison([Measured.of(one) for one in fresh], hardware, found.job.hardware.factors))
    return "\n\n".join([*texts, _write(request, found, run)])


def _check(request: Request) -> None:
    """Check numbers, and that results can be written, before the search."""
    for name in ("gpus", "top", "gpus_per_node", "sequence_length", "global_batch_size", "document_length"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise ConfigError.at(name, f"{value} is not a positive number; give at least 1")
    if request.gpus > MOST_GPUS:
        raise ConfigError.at("gpus", f"{request.gpus} is more than the planner enumerates; give at most {MOST_GPUS}")
    if request.measure < 0:
        raise ConfigError.at("measure", f"{request.measure} is negative; give the number of layouts to measure")
    for name in ("emit", "plot") + (("calibration",) if request.measure else ()):
        check_output_file(name, getattr(request, name))
    if request.plot:
        plot.check_format(request.plot)
    if request.calibration and not request.measure and not request.calibration.exists():
        raise ConfigError.at("calibration", f"{request.calibration}: no such file; make it with --measure")


def _write(request: Request, found: SearchResult, run: RunConfig) -> str:
    """Write the files that are asked for, and return the text of the result."""
    if (request.emit or request.plot) and not found.candidates:
        reasons = "\n".join(report.summarize_rejections(found.rejections))
        raise ConfigError.at("gpus", f"{request.gpus}: no layout fits\n{reasons}")
    if request.emit:
        planned = dump_run(apply_plan(run, found.candidates[0].plan))
        request.emit.write_text(comment(request.model) + planned, encoding="utf-8")
    if request.plot:
        plot.draw(found, request.plot)
    if request.json:
        return json.dumps(report.as_json(found, request.top), indent=1)
    texts = [report.explain(found, condition) for condition in request.why]
    if not texts:
        texts = [report.format_table(found, request.top)]
        texts += [report.format_candidate(found.candidates[0], found.job)] if found.candidates else []
    return "\n\n".join(texts)


def _calibrated(job: Job, runs: Sequence[Run]) -> SearchResult:
    factors = fit_factors([Measured.of(run) for run in runs], job.hardware)
    return search(replace(job, hardware=job.hardware.calibrated(factors)))
