"""Settings of megatron-core: pipeline stages communicate in the same way on GPUs as on the CPU ranks of other tests."""

import pytest

from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.presets import olmo_hybrid_7b
from megatron_hybrid.model import megatron_config


@pytest.mark.parametrize("virtual", [1, 2])
def test_stages_exchange_on_gpus_as_on_the_cpu(virtual, monkeypatch):
    """Never in batches: there two ranks that are each other's next and previous stage take gradients for activations."""
    parallel, found = ParallelConfig(pipeline_parallel_size=2, virtual_pipeline_parallel_size=virtual), []
    for cuda in (False, True):
        monkeypatch.setattr(megatron_config, "has_cuda", lambda cuda=cuda: cuda)
        config = megatron_config.transformer_config(olmo_hybrid_7b(), parallel, PrecisionConfig(), "fp32")
        found.append((config.batch_p2p_comm, config.overlap_p2p_comm, config.deallocate_pipeline_outputs))
    assert found == [(False, virtual > 1, True)] * 2
