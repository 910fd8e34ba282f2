"""Functions that the conversion tests run on ranks."""

from pathlib import Path

import torch

from megatron_hybrid.checkpoint.manager import CheckpointManager
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.config.checkpoint import CheckpointConfig
from testing.jobs import make_engine

_TRAIN = {"steps": 1, "global_batch_size": 1, "dtype": "fp32"}


def logits(checkpoint: str, tokens: torch.Tensor, new_tokens: int = 0, parallel: dict | None = None) -> dict:
    """A checkpoint's logits [b, s, vocabulary or this rank's share of it], of this rank's slice of the tokens, and a greedy
    continuation of them.
    """
    with CheckpointReader(checkpoint) as reader:
        model = reader.index.model
        engine = make_engine(model, parallel or {}, _TRAIN, tokens.shape[1])
        engine.collector().load_weights(reader)
    (chunk,), context = engine.chunks, engine.groups.cp
    with torch.no_grad():
        result = chunk(tokens.chunk(context.size(), dim=1)[context.rank()])
        longer = tokens
        for _ in range(new_tokens):
            following = chunk(longer)[:, -1, : model["vocab_size"]].argmax(-1)
            longer = torch.cat([longer, following[:, None]], dim=1)
    return {"logits": result, "tokens": longer}


def load_and_save(checkpoint: str, folder: str, parallel: dict, train: dict, run: dict | None = None) -> dict:
    """Load a checkpoint through the manager under a layout, and save it again under that layout."""
    with CheckpointReader(checkpoint) as reader:
        model = reader.index.model
    engine = make_engine(model, parallel, _TRAIN | train)
    manager = CheckpointManager(CheckpointConfig(), Path(folder), engine.collector(), model, run or {})
    state, extra = manager.load(Path(checkpoint))
    if state:
        engine.optimizer.set_updates(state["updates"])
    path = manager.save(1, {"updates": engine.optimizer.updates}, {})
    manager.close()
    return {"state": state, "extra": extra, "path": str(path), "updates": engine.optimizer.updates}
