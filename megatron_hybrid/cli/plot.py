"""Draw the loss of a run from its metrics: `megatron-hybrid plot runs/tiny [--out tiny.png]`.

The image shows training loss, validation losses, skipped updates and the learning rate. With several runs, it compares their training
losses by tokens: `megatron-hybrid plot runs/a runs/b --out compared.png`. A running run can be drawn, too.
Exit codes: 0 done; 78 no metrics, or an image that cannot be written.
"""

from pathlib import Path
from typing import Any

from megatron_hybrid.base.errors import ConfigError, no_traceback
from megatron_hybrid.config.command_line import CommandLine, check_output_file


def main() -> int:
    """Run the command and return the exit status."""
    parser = CommandLine(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folders of runs, or files metrics.jsonl")
    parser.add_argument(
        "--out", type=Path, metavar="PNG", help="image to write (default: loss.png in a single run's folder)"
    )
    parser.add_argument("--title", help="title of a single run's image (default: none)")
    arguments = parser.parse()
    with no_traceback():
        files = [metrics_file(run) for run in arguments.runs]
        if arguments.out is None and len(files) > 1:
            raise ConfigError.at("--out", f"{len(files)} runs are drawn into one image; name it")
        image = arguments.out or files[0].parent / "loss.png"
        check_output_file("--out", image)
        draw_runs(files, image, arguments.title)
    print(image)
    return 0


def metrics_file(run: Path) -> Path:
    """Return the metrics of a run's folder, or the file itself.

    Raises:
        ConfigError: there is no such file.
    """
    file = run / "metrics.jsonl" if run.is_dir() else run
    if not file.is_file():
        raise ConfigError.at(str(run), f"{file} does not exist; give the run_dir of a run that has trained")
    return file


def draw_runs(files: list[Path], image: Path, title: str | None) -> None:
    """Draw one run with all its curves, or the training losses of several."""
    from megatron_hybrid.observe.plot import Curve, draw
    from megatron_hybrid.observe.stages_plot import StageCurve, draw_stages

    records = [read_steps(file) for file in files]
    if len(files) > 1:
        curves = [
            StageCurve(file.parent.name, [step["tokens"] for step in steps], [step["loss"] for step in steps])
            for file, steps in zip(files, records)
        ]
        return draw_stages(curves, image)
    draw(Curve.read(files[0]), image, title)


def read_steps(file: Path) -> list[dict[str, Any]]:
    """Return the records of training steps.

    Raises:
        ConfigError: the file is damaged, or holds no step.
    """
    from megatron_hybrid.observe.metrics import read_metrics

    try:
        steps = [record for record in read_metrics(file) if record.get("loss") is not None]
    except ValueError as error:
        raise ConfigError.at("", f"{error}; resuming the run repairs it") from None
    if not steps:
        raise ConfigError.at(str(file), "holds no training step yet; wait for the first, or leave the run out")
    return steps
