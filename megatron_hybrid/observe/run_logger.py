"""RunLogger: the single interface for metrics and messages of a run."""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

from megatron_hybrid.config.logging import LoggingConfig
from megatron_hybrid.observe.console import make_console
from megatron_hybrid.observe.gpu_state import GpuState
from megatron_hybrid.observe.keys import Evaluation, evaluation_key, tag
from megatron_hybrid.observe.metrics import MetricsWriter, plain
from megatron_hybrid.observe.outputs import Output, RetriedSink
from megatron_hybrid.observe.plot import Curve, draw
from megatron_hybrid.observe.sinks import check_sinks, sink_makers
from megatron_hybrid.observe.throughput import StepClock, memory_gb, peak_tflops, rates


class RunLogger:
    """Logger of metrics.jsonl, loss.png, TensorBoard, W&B and the console. Every rank creates one; only rank 0 writes.

    A failure of an output is reported once and does not end the run. Lines of metrics.jsonl are kept until they can be written.

    Call `log_step` after every update (also after a skipped one) and `log_evaluation` after an evaluation of the same step. Put
    `with logger.pause():` around everything that is not training time. Use the logger as a context manager, so that the terminal stays
    usable after an exception.

    Args:
        config: outputs and intervals.
        run_dir: folder of the run.
        rank: rank of this process in the world.
        total_steps: steps of the whole run, for the ETA.
        start_step, start_tokens: progress of the checkpoint that the run resumes from; later lines are dropped.
        continues: True if earlier logs in this folder belong to the run. If False, W&B gets a new run.
        flops_per_token: FLOPs of the model, forward and backward. None: neither TFLOP/s nor MFU.
        num_devices: world size.
        device_name: result of `torch.cuda.get_device_name`. None: the ranks run on CPU.
        format_speedup: peak of the linears' format over that of bf16 (observe/throughput.py).
        settings: resolved configuration, for W&B.
        console_every: steps between lines if stdout is not a terminal.

    Raises:
        UserError: W&B or TensorBoard is enabled and cannot write (observe/sinks.py).
    """

    def __init__(
        self,
        config: LoggingConfig,
        run_dir: Path | str,
        rank: int,
        *,
        total_steps: int,
        start_step: int = 0,
        start_tokens: int = 0,
        continues: bool = True,
        flops_per_token: float | None = None,
        num_devices: int = 1,
        device_name: str | None = None,
        format_speedup: float | None = None,
        settings: Mapping[str, Any] | None = None,
        console_every: int = 10,
    ) -> None:
        self.config, self.run_dir, self.writes = config, Path(run_dir), rank == 0
        check_sinks(config, self.run_dir, self.writes)
        self._clock = StepClock()
        self._total_steps, self._tokens, self._start_tokens = total_steps, start_tokens, start_tokens
        self._flops_per_token, self._num_devices, self._cuda = flops_per_token, num_devices, device_name is not None
        self._peak, self._format_speedup = config.peak_tflops or peak_tflops(device_name), format_speedup
        if not self.writes:
            return
        self._console = make_console(total_steps, start_step, every=console_every)
        self._start_step = start_step
        self._metrics: MetricsWriter | None = None
        self._curve = Curve()
        self._metrics_output, self._plot_output = Output("metrics.jsonl", self.info), Output("loss.png", self.info)
        self._metrics_output.attempt(self._open_metrics)
        makers = sink_makers(config, self.run_dir, settings, continues)
        self._sinks = [RetriedSink(name, make, start_step, self.info) for name, make in makers.items()]
        self._record: dict[str, Any] = {"step": start_step}
        self._gpu = GpuState(self.info) if self._cuda else None
        self._trained = 0.0
        if self._cuda and flops_per_token is not None and self._peak is None:
            self.info(f"no MFU: the peak of {device_name!r} is not known; set logging.peak_tflops (dense bf16 TFLOP/s)")

    def pause(self) -> AbstractContextManager[None]:
        """Return a context whose time does not count towards tokens/s. Any rank may call it."""
        return self._clock.pause()

    def info(self, message: str) -> None:
        """Print a line on rank 0's console, above the progress bar."""
        if self.writes:
            self._console.info(message)

    def log_step(self, step: int, values: Mapping[str, Any]) -> None:
        """Log an update.

        Args:
            step: number of the update; the first is 1.
            values: loss, z_loss, grad_norm, lr and other numbers, also of torch or numpy. `tokens`: all tokens that the run has
                trained on, this step included. `skipped`: the reason why the update was skipped, or None. Given values take precedence
                over values measured here, such as `memory_gb`.
        """
        if not self.writes:
            return
        seconds = self._clock.lap()
        self._trained += seconds
        record = {"step": step} | {key: plain(value) for key, value in values.items() if key != "skipped"}
        measured: dict[str, Any] = {"seconds": seconds, "memory_gb": memory_gb(self._cuda), "time": time.time()}
        if "tokens" in record:
            step_tokens, self._tokens = record["tokens"] - self._tokens, record["tokens"]
            measured |= rates(
                step_tokens, seconds, self._num_devices, self._flops_per_token, self._peak, self._format_speedup
            )
            measured |= self._goodput()
        measured["skipped"] = values.get("skipped") is not None
        if measured["skipped"]:
            measured["skip_reason"] = str(values["skipped"])
        record |= {key: value for key, value in measured.items() if key not in record}
        if self._gpu is not None:
            self._gpu.read()
        written = step % self.config.interval == 0 or step in (1, self._total_steps) or record["skipped"]
        if written and self._gpu is not None:
            record |= self._gpu.means()
        self._record = record
        self._console.step(step, record)
        if written:
            self._write(record)
        if self.config.plot_interval and step % self.config.plot_interval == 0:
            with self.pause():
                self._draw()

    def _goodput(self) -> dict[str, float]:
        """Return tokens/s since this process began to train, pauses included, and the share of that time spent in steps."""
        elapsed = self._clock.elapsed
        return {
            "goodput_tokens_per_s": (self._tokens - self._start_tokens) / elapsed,
            "goodput": self._trained / elapsed,
        }

    def log_evaluation(self, step: int, sets: Mapping[str, Evaluation]) -> None:
        """Log evaluations after update `step`, on the step's line if it is not written yet.

        Args:
            sets: results by the name of the validation set. The metrics of a set are logged as `eval/<set>/<name>`, and those of the
                set without a name as `eval_<name>`.
        """
        if not self.writes:
            return
        record: dict[str, Any] = {"step": step}
        for name, found in sets.items():
            record |= {evaluation_key(name, metric): plain(v) for metric, v in found.metrics().items()}
        with self.pause():
            for name, found in sets.items():
                self.info(f"step {step}/{self._total_steps}  evaluation{f' of {name}' if name else ''}: {found}")
            self._write_with_step(record)

    def log_tasks(self, step: int, results: Mapping[str, Mapping[str, float]]) -> None:
        """Log the metrics of downstream tasks after update `step` as `eval/<task>/<metric>`, as `log_evaluation` does."""
        if not self.writes:
            return
        record: dict[str, Any] = {"step": step}
        with self.pause():
            for task, metrics in results.items():
                record |= {f"eval/{task}/{name}": plain(value) for name, value in metrics.items()}
                shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
                self.info(f"step {step}/{self._total_steps}  task {task}: {shown}")
            self._write_with_step(record)

    def _write_with_step(self, record: dict[str, Any]) -> None:
        """Write a record, together with the metrics of its step if those are not written yet."""
        step = record["step"]
        unwritten = self._record["step"] == step and (self._metrics is None or self._metrics.last_step != step)
        self._write(self._record | record if unwritten else record)

    def close(self) -> None:
        """Draw loss.png a last time and close all outputs. A second call has no effect."""
        if not self.writes:
            return
        self._draw()
        for sink in self._sinks:
            sink.close()
        if self._metrics is not None:
            self._metrics_output.attempt(self._metrics.close)
        self.writes = False
        self._console.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open_metrics(self) -> MetricsWriter:
        if self._metrics is None:
            self._metrics = MetricsWriter(self.run_dir / "metrics.jsonl", self._start_step)
            self._curve = Curve.read(self._metrics.path)
            if self._metrics.repaired:
                self.info(self._metrics.repaired)
        return self._metrics

    def _write(self, record: Mapping[str, Any]) -> None:
        self._metrics_output.attempt(lambda: self._open_metrics().write(record))
        self._curve.add(record)
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k not in ("step", "time")}
        scalars = {tag(key): float(value) for key, value in numbers.items()}
        for sink in self._sinks:
            sink.log(record["step"], scalars)

    def _draw(self) -> None:
        if self._curve.steps or self._curve.evaluations:
            file = self.run_dir / "loss.png"
            self._plot_output.attempt(lambda: draw(self._curve, file, title=self.run_dir.resolve().name))
