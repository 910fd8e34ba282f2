"""Functions that the planner's tests run on ranks."""

from torch.distributed import get_rank

from testing.jobs import batches_of, make_engine, samples_of_step


def state_bytes(model: dict, parallel: dict, train: dict) -> dict[str, int]:
    """Return the bytes that this rank holds between steps, and its place in the layout."""
    engine = make_engine(model, parallel, train)
    sharded = engine.parallel.distributed_optimizer
    buffers = [buffer for chunk in engine.wrapped for buffer in chunk.buffers]
    parameters = [p for chunk in engine.chunks for p in chunk.parameters()]
    weights = (b.param_data for b in buffers) if sharded else parameters
    states = (s for shard in engine.optimizer.shards().values() for s in shard.states.values())
    return {
        "rank": get_rank(),
        "pipeline_rank": engine.groups.pp.rank(),
        "dp_rank": engine.groups.dp_cp.rank(),
        "parameters": sum(p.numel() for p in parameters),
        "weights": sum(w.numel() * w.element_size() for w in weights),
        "gradients": sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
        "optimizer": sum(s.numel() * s.element_size() for s in states),
    }


def offloaded_bytes(model: dict, parallel: dict, train: dict) -> dict[str, int]:
    """Bytes of what megatron-core's hybrid optimizer holds after a step, on the host and on the device."""
    engine = make_engine(model, parallel, train)
    batch, vocabulary = train["global_batch_size"], model["vocab_size"]
    engine.forward_backward(batches_of(engine, samples_of_step(0, batch, vocabulary), 1))
    engine.update(1e-3, engine.gradient_norm())
    (part,) = engine.optimizer._parts()
    hybrid, found = part.optimizer, {"host": 0, "device": 0}
    for adam in hybrid.sub_optimizers:
        for tensor, state in adam.state.items():
            copied = hybrid.inner_param_to_orig_param[tensor] is not tensor  # else it is the parameter itself
            held = [state["exp_avg"], state["exp_avg_sq"], *([tensor] if copied else [])]
            on_host = adam is not hybrid.gpu_optimizer
            held += [tensor.grad] if on_host else []
            found["host" if on_host else "device"] += sum(h.numel() * h.element_size() for h in held)
    return found | {"dp_rank": engine.groups.dp.rank()}
