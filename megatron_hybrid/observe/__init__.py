"""What a run tells about itself: metrics.jsonl, console, TensorBoard / W&B, loss.png, throughput.

Knows neither megatron nor the trainer, which holds one RunLogger and calls it.
"""

from megatron_hybrid.observe.run_logger import RunLogger

__all__ = ["RunLogger"]
