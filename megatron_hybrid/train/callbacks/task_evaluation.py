"""Callback that evaluates downstream tasks during training."""

from typing import cast

from megatron_hybrid.base.errors import ConfigError, UserError
from megatron_hybrid.base.heartbeat import heartbeat
from megatron_hybrid.config.tasks import TasksConfig, generation_problems, scoring_sizes
from megatron_hybrid.data.tokenizer import load_tokenizer
from megatron_hybrid.evaluation.engine_scores import EngineScorer
from megatron_hybrid.evaluation.local_tasks import evaluate_choices, evaluate_task
from megatron_hybrid.evaluation.task_files import TaskFile, generate_text, read_tasks
from megatron_hybrid.evaluation.task_model import TaskModel
from megatron_hybrid.inference.load import LoadedModel
from megatron_hybrid.train.callbacks.base import Callback, Run, StepOutcome
from megatron_hybrid.train.engines.megatron import MegatronEngine


class TaskEvaluation(Callback):
    """Evaluates `tasks.paths` every `tasks.interval` steps and after the last step.

    Writes `eval/<task>/<metric>` to the metrics of the step and TensorBoard, and a line per task to the console. Data parallel
    ranks share the documents. Training waits meanwhile, so limit large tasks with `tasks.limit`.

    Choices are scored by the engine's evaluation, as validation sets are, so they run under every layout. Text is generated with
    caches, which need whole layers and whole sequences on each rank.
    """

    def __init__(self, config: TasksConfig) -> None:
        self.config = config
        self.tasks: list[TaskFile] = []

    def setup(self, run: Run) -> None:
        """Read all tasks and the tokenizer, so that a wrong file ends the run before its first step."""
        config = run.config
        try:
            self.tasks = read_tasks(self.config.paths)
        except UserError as error:
            raise ConfigError.at("tasks.paths", str(error)) from None
        if generate_text(self.tasks):
            generation_problems(config.model, config.train, config.parallel, config.precision).raise_if_any()
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        sizes = scoring_sizes(self.config, config.data.sequence_length, config.train, config.parallel)
        self.scorer = EngineScorer(run.engine.evaluate, run.engine.groups, sizes, config.model.vocab_size)

    def end_step(self, run: Run, outcome: StepOutcome) -> None:
        step = run.progress.step
        if step % self.config.interval == 0 or step == run.config.train.steps:
            self.evaluate(run)

    def evaluate(self, run: Run) -> dict[str, dict[str, float]]:
        """Return and log the results of all tasks."""
        with run.logger.pause(), heartbeat.doing(f"evaluating tasks after step {run.progress.step}", section="step"):
            results = self._choices() | self._generations(run)
        ordered = {task.name: results[task.name] for task in self.tasks}
        run.logger.log_tasks(run.progress.step, ordered)
        return ordered

    def _choices(self) -> dict[str, dict[str, float]]:
        return {
            task.name: evaluate_choices(task, self.tokenizer, self.scorer.log_likelihoods, self.config.limit)
            for task in self.tasks
            if task.output_type == "multiple_choice"
        }

    def _generations(self, run: Run) -> dict[str, dict[str, float]]:
        if not generate_text(self.tasks):
            return {}
        engine, length = cast(MegatronEngine, run.engine), run.config.data.sequence_length
        engine.optimizer.gather_parameters()  # a cache reads parameters without the hooks that would gather them
        (network,) = engine.chunks
        loaded = LoadedModel(network.eval(), run.config.model, {}, None, run.config.data.tokenizer)
        model = TaskModel(loaded, self.tokenizer, length, self.config.batch_size)
        results = {
            task.name: evaluate_task(model, task, self.config.limit)
            for task in self.tasks
            if task.output_type == "generate_until"
        }
        network.train()
        return results
