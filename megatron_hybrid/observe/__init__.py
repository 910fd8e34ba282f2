"""Metrics of a run: metrics.jsonl, console, TensorBoard, Weights & Biases, loss.png, throughput.

The trainer calls one RunLogger. This package imports neither megatron-core nor the trainer.
"""

from megatron_hybrid.observe.run_logger import RunLogger

__all__ = ["RunLogger"]
