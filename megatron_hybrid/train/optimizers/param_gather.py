"""Order in which megatron-core gathers updated parameters during the forward pass (parallel.overlap_param_gather)."""

from megatron.core.distributed import DistributedDataParallel


def unlink_buffers(wrapped: DistributedDataParallel) -> None:
    """Let each buffer of a model chunk be gathered in its own order.

    Parameters of another dtype, as the fp32 decay of a delta rule, are in a buffer of their own, and so are matrices that an optimizer
    needs whole. DDP gathers all buckets of one buffer before those of the next (distributed/distributed_data_parallel.py:309), but
    a layer's forward pass needs parameters of all buffers. Where one buffer ends, megatron-core would find the next one's first
    bucket gathered already and warn of a wrong order.
    """
    if not wrapped.ddp_config.overlap_param_gather:
        return
    buffer_of = {id(bucket): number for number, buffer in enumerate(wrapped.buffers) for bucket in buffer.buckets}
    for group in wrapped.bucket_groups:
        following = group.next_param_gather_bucket_group
        if following and buffer_of[id(following.buckets[0])] != buffer_of[id(group.buckets[0])]:
            group.next_param_gather_bucket_group = None
