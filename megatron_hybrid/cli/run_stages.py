"""Run the stages of a file in order: pretraining, mid-training, averages, long context.

megatron-hybrid run-stages examples/stages/tiny/stages.yaml --cpu-ranks 2
megatron-hybrid run-stages examples/stages/olmo_hybrid_7b/stages.yaml --dry-run --world-size 128
megatron-hybrid run-stages examples/stages/olmo_hybrid_7b/stages.yaml --slurm      # one job per stage

After an interruption the same command continues: what is done is read from the stages' folders. With --slurm, a failed stage
cancels the jobs that depend on it. Cancel other jobs that are still in the queue first. Overrides apply to the runs of all stages.
Exit codes: 0 done; 75 stopped by a signal with its work saved; 78 wrong input; otherwise the status of the stage that failed.
"""

from pathlib import Path

from megatron_hybrid.base.errors import no_traceback
from megatron_hybrid.base.numbers import positive
from megatron_hybrid.config.command_line import RunCommandLine
from megatron_hybrid.stages.check import check_work
from megatron_hybrid.stages.config import load_stages
from megatron_hybrid.stages.execute import run_all, shell_script, submit_all
from megatron_hybrid.stages.plan import plan_work
from megatron_hybrid.stages.plot import plot_stages


def main() -> int:
    """Run the command and return the exit status."""
    parser = RunCommandLine(__doc__, "a YAML file that lists stages")
    add = parser.add_argument
    add("--folder", help="folder of all stages (default: the file's)")
    add("--cpu-ranks", type=positive, metavar="N", help="N ranks on CPU (default: ranks on GPUs)")
    add("--gpus", type=positive, metavar="N", help="this machine must have N (default: as many as are visible)")
    add("--slurm", action="store_true", help="submit each stage as a job that depends on the stages it starts from")
    add("--dry-run", action="store_true", help="check all stages, print them and the jobs of --slurm, and stop")
    add("--world-size", type=positive, help="number of ranks to check layouts for (default: --cpu-ranks or --gpus)")
    add("--files", choices=("warn", "require", "skip"), default="warn", help="as of megatron-hybrid pretrain --dry-run")
    a = parser.parse()
    with no_traceback():
        file = Path(a.config)
        config = load_stages(file)
        config = config.model_copy(update={"folder": a.folder}) if a.folder else config
        work = plan_work(config, file, a.overrides)
        lines = check_work(work, a.world_size or a.cpu_ranks or a.gpus, a.files)
        if a.dry_run:
            print("\n".join([*lines, "", *shell_script(work, config.slurm)]))
            return 0
        if a.slurm:
            submit_all(work, config.slurm)
            return 0
        ranks = ["--cpu-ranks", str(a.cpu_ranks)] if a.cpu_ranks else ["--gpus", str(a.gpus)] if a.gpus else []
        return run_all(work, ranks, lambda: plot_stages(work, Path(config.folder) / "loss.png"))
