"""Vocabulary-parallel cross-entropy and z-loss against torch on the whole vocabulary."""

import pytest
import torch
import torch.nn.functional as F

from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.model.cross_entropy import vocab_parallel_losses
from megatron_hybrid.parallel.launch import Launch, start_distributed


def losses_and_gradient(logits, labels, vocab_size, tp, dtype):
    """One rank's part: on a slice of the padded vocabulary."""
    groups = start_distributed(Launch.from_environment(), ParallelConfig(tensor_parallel_size=tp), seed=0)
    mine = logits.chunk(tp, -1)[groups.tp.rank()].to(dtype).requires_grad_()
    loss, z_loss = vocab_parallel_losses(mine, labels, vocab_size, groups.tp)
    (loss.mean() + 0.1 * z_loss.mean()).backward()
    return loss.detach(), z_loss.detach(), mine.grad


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [64, 61, 45])
def test_against_torch(tp, vocab_size, ranks):
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(6, 3, 64, generator=generator)
    labels = torch.randint(0, vocab_size, (6, 3), generator=generator)
    labels[0, 0], labels[0, 1] = 0, vocab_size - 1

    whole = logits[..., :vocab_size].double().requires_grad_()
    expected = F.cross_entropy(whole.flatten(0, 1), labels.flatten(), reduction="none").view(6, 3)
    expected_z = whole.logsumexp(-1).square()
    (expected.mean() + 0.1 * expected_z.mean()).backward()

    results = ranks.run(
        losses_and_gradient, tp, logits=logits, labels=labels, vocab_size=vocab_size, tp=tp, dtype=torch.float32
    )
    for loss, z_loss, _ in results:
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(z_loss.double(), expected_z.detach(), rtol=1e-6, atol=1e-5)
    gradient = torch.cat([gradient for *_, gradient in results], -1)
    torch.testing.assert_close(gradient[..., :vocab_size].double(), whole.grad, rtol=1e-5, atol=1e-7)
    assert not gradient[..., vocab_size:].any(), "padding receives no gradient"


def test_bf16_logits_are_summed_in_fp32(ranks):
    logits, labels = torch.randn(4, 2, 4096), torch.zeros(4, 2, dtype=torch.int64)
    ((loss, _, gradient),) = ranks.run(
        losses_and_gradient, 1, logits=logits, labels=labels, vocab_size=4096, tp=1, dtype=torch.bfloat16
    )
    expected = F.cross_entropy(logits.bfloat16().double().flatten(0, 1), labels.flatten(), reduction="none")
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double().flatten(), expected, rtol=1e-5, atol=1e-5)
