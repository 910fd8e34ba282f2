"""The layer specs in plain megatron-core models."""

import subprocess
import sys

import pytest
import torch

from megatron_hybrid.spec import GatedDeltaNetConfig, gated_delta_net_layer_spec
from tests.spec import jobs

SIZES = dict(num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=16)


@pytest.mark.parametrize("tp, sequence_parallel", [(1, [False]), (2, [False, True])])
def test_both_models_train(ranks, tp, sequence_parallel):
    found = ranks.run(jobs.trained, tp, tp=tp, sequence_parallel=sequence_parallel, steps=12)
    for rank in found:
        for case, result in rank.items():
            assert result["zero"] == result["dead"] == result["not finite"] == [], case
            assert result["loss"] == pytest.approx(4.86, abs=0.1), case  # ln(128) of random weights
            assert result["losses"][-1] < 0.8 * result["losses"][0], case
    assert all(rank[case]["losses"] == found[0][case]["losses"] for rank in found for case in rank)


@pytest.mark.parametrize("tp", [1, 2])
def test_the_loss_is_the_trainers_from_the_same_weights(ranks, tp):
    for rank in ranks.run(jobs.beside_trainer, tp, tp=tp):
        for model, (expected, found) in rank.items():
            assert found == pytest.approx(expected, abs=1e-5), model


@pytest.mark.parametrize(("sp", "lengths"), [(False, [5, 1, 2, 30, 3]), (True, [4, 2, 2, 30, 6])])
def test_packed_documents_are_as_if_alone(sp, lengths, ranks):
    """megatron-core's PackedSeqParams, boundaries in two tensors and an empty document at the end."""
    for found in ranks.run(jobs.packed_documents, 2, tp=2, sp=sp, lengths=lengths):
        assert all(error < 1e-5 for error in found.values()), found


def test_padding_may_be_longer_than_every_document(ranks):
    (found,) = ranks.run(jobs.padded_documents, 1, tail=16)
    assert max(found.values()) < 1e-5


def test_recompute_changes_no_gradient(ranks):
    (found,) = ranks.run(jobs.recomputed, 1)
    for way in ("selective", "full"):
        for name, gradient in found["none"].items():
            assert torch.equal(found[way][name], gradient), (way, name)


def test_pipeline_stages_and_tensor_parallelism(ranks):
    losses = [loss for loss in ranks.run(jobs.in_stages, 4, tp=2, pp=2) if loss is not None]
    assert len(losses) == 2  # the last stage's ranks
    assert losses == pytest.approx([4.852, 4.852], abs=1e-2)  # ln(128): the weights are small


def test_a_checkpoint_loads_at_other_tensor_parallel_sizes(ranks, tmp_path):
    expected = ranks.run(jobs.reloaded, 2, tp=2, folder=str(tmp_path), save=True)[0]
    for tp in (1, 4):  # at 4, 6 heads are padded to 8, and the last rank has dummies alone
        for rank in ranks.run(jobs.reloaded, tp, tp=tp, folder=str(tmp_path), save=False):
            for model, losses in expected.items():
                assert rank[model] == pytest.approx(losses, abs=1e-5), (tp, model)


def test_scalars_stay_fp32_in_a_bf16_model(ranks):
    (found,) = ranks.run(jobs.in_bf16, 1)
    fp32 = {name for name, dtype in found["dtypes"].items() if dtype == torch.float32}
    assert fp32 == {"A_log", "dt_bias"}
    assert found["same"] and found["moved"]
    assert found["states found"][jobs.WD_GROUPS]
    assert found["decays"] == {0.0}


def test_what_is_not_supported_is_refused_by_name(ranks):
    (said,) = ranks.run(jobs.refusals, 1)
    for case, message in said.items():
        if case.endswith("causal"):
            assert message == "accepted", case
        else:
            assert message.startswith(f"{case.split()[-1]}: "), (case, message)


def test_attention_obeys_the_settings_of_megatron_core(ranks):
    (found,) = ranks.run(jobs.attention_settings, 1)
    for setting, (with_it, equal, without) in found.items():
        assert with_it == pytest.approx(equal, rel=1e-6), setting
        assert abs(with_it - without) > 1e-5, setting


@pytest.mark.parametrize(
    "change, field",
    [
        (dict(num_value_heads=5), "num_value_heads"),
        (dict(num_key_heads=0), "num_key_heads"),
        (dict(key_head_dim="8"), "key_head_dim"),
        (dict(conv_kernel_size=3), "conv_kernel_size"),
        (dict(heads=3), "heads"),
    ],
)
def test_wrong_sizes_are_refused_by_name(change, field):
    with pytest.raises(ValueError, match=field):
        GatedDeltaNetConfig(**SIZES | change)


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="backend: 'te' is none of auto, local, transformer_engine"):
        gated_delta_net_layer_spec(GatedDeltaNetConfig(**SIZES), "te")
    with pytest.raises(ValueError, match="gdn: is a dict"):
        gated_delta_net_layer_spec(SIZES)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="backend: transformer_engine cannot run: no CUDA device is visible"):
            gated_delta_net_layer_spec(GatedDeltaNetConfig(**SIZES), "transformer_engine")


def test_importing_it_changes_nothing():
    code = """if True:
        import logging, os, warnings
        import torch, megatron.core.optimizer, megatron.core.tensor_parallel.random as random
        import megatron.core.models.gpt, megatron.core.models.hybrid.hybrid_layer_specs
        from megatron.core.transformer import torch_norm, transformer_block
        from megatron.core.models.hybrid import hybrid_block
        places = (torch, torch.Tensor, torch.cuda, torch.cuda.random, random, torch_norm.WrappedTorchNorm,
                  transformer_block, hybrid_block)
        def state():
            loggers = {name: (logger.level, list(logger.filters)) for name, logger in logging.root.manager.loggerDict.items()
                       if isinstance(logger, logging.Logger) and logger.filters}
            return [dict(vars(place)) for place in places], list(warnings.filters), dict(os.environ), loggers
        before = state()
        import megatron_hybrid.spec
        assert state() == before
        megatron_hybrid.spec.enable_cpu_backend()
        assert state()[0] != before[0] and torch.cuda.current_device() == torch.device("cpu")
    """
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())


def _environment() -> dict:
    import os

    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{jobs.ROOT}:{jobs.ROOT / 'kernels'}"}
