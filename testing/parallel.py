"""Fields of `parallel` for layouts, by their degrees."""

OVERLAP = dict(overlap_grad_reduce=True, overlap_param_gather=True)


def layout(tp=1, pp=1, vpp=1, cp=1, **more) -> dict:
    sizes = dict(tensor_parallel_size=tp, pipeline_parallel_size=pp, virtual_pipeline_parallel_size=vpp)
    return sizes | dict(context_parallel_size=cp) | more
