"""Callback that evaluates downstream tasks during training."""

from pathlib import Path
from typing import cast

from megatron_hybrid.base.errors import ConfigError, UserError
from megatron_hybrid.base.heartbeat import heartbeat
from megatron_hybrid.config.tasks import TasksConfig
from megatron_hybrid.evaluation.local_tasks import evaluate_task
from megatron_hybrid.evaluation.task_files import TaskFile, read_task, task_paths
from megatron_hybrid.evaluation.task_model import TaskModel
from megatron_hybrid.inference.load import LoadedModel
from megatron_hybrid.train.callbacks.base import Callback, Run, StepOutcome
from megatron_hybrid.train.engines.megatron import MegatronEngine


class TaskEvaluation(Callback):
    """Evaluates `tasks.paths` every `tasks.interval` steps and after the last step.

    Writes `eval/<task>/<metric>` to the metrics of the step and TensorBoard, and a line per task to the console. Data parallel
    ranks share the documents. Training waits meanwhile, so limit large tasks with `tasks.limit`.
    """

    def __init__(self, config: TasksConfig) -> None:
        self.config = config
        self.tasks: list[TaskFile] = []

    def setup(self, run: Run) -> None:
        """Read all tasks and the tokenizer, so that a wrong file ends the run before its first step."""
        try:
            self.tasks = [read_task(path) for name in self.config.paths for path in task_paths(Path(name))]
        except UserError as error:
            raise ConfigError.at("tasks.paths", str(error)) from None
        if run.config.data.tokenizer is None:
            raise ConfigError.at(
                "data.tokenizer", "is missing, and tasks need it; name the one that the data was made with"
            )
        self.model = self._task_model(run)

    def end_step(self, run: Run, outcome: StepOutcome) -> None:
        step = run.progress.step
        if step % self.config.interval == 0 or step == run.config.train.steps:
            self.evaluate(run)

    def evaluate(self, run: Run) -> dict[str, dict[str, float]]:
        """Return and log the results of all tasks."""
        engine = cast(MegatronEngine, run.engine)
        engine.optimizer.gather_parameters()  # a cache reads parameters without the hooks that would gather them
        network = self.model.model.network.eval()
        with run.logger.pause(), heartbeat.doing(f"evaluating tasks after step {run.progress.step}", section="step"):
            results = {task.name: evaluate_task(self.model, task, self.config.limit) for task in self.tasks}
        network.train()
        run.logger.log_tasks(run.progress.step, results)
        return results

    def _task_model(self, run: Run) -> TaskModel:
        (network,) = cast(MegatronEngine, run.engine).chunks
        config, tokenizer = run.config.model, run.config.data.tokenizer
        loaded = LoadedModel(network, config, {}, None, tokenizer)
        return TaskModel.of(loaded, tokenizer, run.config.data.sequence_length, self.config.batch_size)
