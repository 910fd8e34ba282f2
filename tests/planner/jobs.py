"""What these tests run on ranks."""

from torch.distributed import get_rank

from tests.jobs import make_engine


def state_bytes(model: dict, parallel: dict, train: dict) -> dict[str, int]:
    """What this rank holds between steps, in bytes, and where it stands."""
    engine = make_engine(model, parallel, train)
    sharded = engine.parallel.distributed_optimizer
    buffers = [buffer for chunk in engine.wrapped for buffer in chunk.buffers]
    parameters = [p for chunk in engine.chunks for p in chunk.parameters()]
    weights = (b.param_data for b in buffers) if sharded else parameters
    states = (s for shard in engine.optimizer.shards().values() for s in shard.states.values())
    return {
        "rank": get_rank(),
        "pipeline_rank": engine.groups.pp.rank(),
        "dp_rank": engine.groups.dp.rank(),
        "parameters": sum(p.numel() for p in parameters),
        "weights": sum(w.numel() * w.element_size() for w in weights),
        "gradients": sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
        "optimizer": sum(s.numel() * s.element_size() for s in states),
    }
