"""linear_cross_entropy at OLMo Hybrid 7B's output layer: errors against fp64, time and peak memory, next to its peers.

8192 tokens, hidden size 3840, vocabulary 100352, bf16; and the slice of one of two tensor parallel ranks. A mirror stands for the
other rank: its collectives are local copies. Baselines: torch on all logits (bf16 from the GEMM, losses in fp32, as in
Megatron), eager and compiled; the fused linear cross-entropy of fla and, if installed, of Liger.
"""

import gc

import torch
import torch.nn.functional as F
from kernel_timing import copy_tb_s, gpu_ms, kernels, write_gpu
from report import row

from hybrid_kernels.dispatch import has_module
from hybrid_kernels.linear_cross_entropy import linear_cross_entropy
from hybrid_kernels.testing import loss_inputs, mirror_vocab_parallel, relative_error

T, H, V, Z = 8192, 3840, 100352, 1e-5
FLOPS = 3 * 2 * T * H * V  # logits, and the gradients of hidden and weight
PEAK = 798  # TFLOP/s of an 8192^3 bf16 product


def ours(**options):
    def fn(hidden, weight, labels, mask):
        return linear_cross_entropy(
            hidden, weight, labels, mask, true_vocab_size=V, z_loss_weight=Z, backend="triton", **options
        )[0]

    return fn


def torch_losses(hidden, weight, labels, mask):
    logits = F.linear(hidden, weight).float()
    cross_entropy = F.cross_entropy(logits, labels, reduction="none")
    return ((cross_entropy + Z * logits.logsumexp(-1).square()) * mask).mean()


def fla_losses(in_fp32):
    from fla.modules import FusedLinearCrossEntropyLoss

    loss = FusedLinearCrossEntropyLoss(accumulate_grad_in_fp32=in_fp32)  # no z-loss, no mask
    return lambda hidden, weight, labels, mask: loss(hidden, labels, weight)


def liger_losses():
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(lse_square_scale=Z, accum_dtype=torch.float32)
    return lambda hidden, weight, labels, mask: loss(weight, hidden, labels)


def versions() -> dict:
    all_of_them = {
        "ours": ours(),
        "ours, bf16 logits": ours(fp32_logits=False),
        "ours, one chunk": ours(chunk_tokens=T),
        "torch, all logits": torch_losses,
        "torch.compile of it": torch.compile(torch_losses),
        "fla 0.6": fla_losses(True),
        "fla 0.6, gradient summed in bf16": fla_losses(False),
    }
    if has_module("liger_kernel"):
        all_of_them["Liger, gradient summed in fp32"] = liger_losses()
    return all_of_them


def gradients(fn, inputs):
    loss = fn(*inputs)
    return loss.detach(), *torch.autograd.grad(loss, inputs[:2])


def in_fp64(z_loss_weight):
    options = dict(true_vocab_size=V, z_loss_weight=z_loss_weight, backend="torch")
    return lambda *inputs: linear_cross_entropy(*inputs, **options)[0]


def errors(peers: dict) -> list[dict]:
    """On 2048 tokens, none masked. Labels drawn from the softmax, as a trained model meets them, or at random."""
    rows = []
    for name, spread in (("random weights", 1.0), ("wide logits, labels drawn from them", 4.0)):
        hidden, weight, labels, _ = loss_inputs((2048,), H, V, V, dtype=torch.bfloat16, device="cuda", spread=spread)
        labels[-1], mask = 0, torch.ones(2048, device="cuda")
        if spread > 1:
            noise = torch.empty(2048, V, device="cuda").exponential_()
            labels = ((hidden @ weight.t()).float() - noise.log()).argmax(-1)
        doubles = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
        with_z, without_z = (gradients(in_fp64(z), [*doubles, labels, mask]) for z in (Z, 0.0))
        measured = {}
        for peer, fn in peers.items():
            if "compile" in peer or "chunk" in peer:  # the same numbers
                continue
            exact = without_z if peer.startswith("fla") else with_z
            got = gradients(fn, [hidden.requires_grad_(), weight.requires_grad_(), labels, mask])
            measured[peer] = [relative_error(x, y) for x, y in zip(got, exact)]
            del got
        for peer in list(measured)[1:]:
            for i, what in enumerate(("loss", "hidden's gradient", "weight's gradient")):
                errors_of = f"error of {what}", "relative RMS", measured["ours"][i], measured[peer][i]
                rows.append(row(name, *errors_of, peer))
        del with_z, without_z, exact, doubles
        gc.collect(), torch.cuda.empty_cache()
    return rows


def measure(fn, inputs) -> dict:
    """Milliseconds and peak GiB, besides the inputs, of one forward and backward pass; milliseconds of a forward alone."""

    def both():
        loss = fn(*inputs)
        return torch.autograd.grad(loss, inputs[:2], allow_unused=True)  # weight's may go into a buffer

    def forward():
        with torch.no_grad():
            fn(*inputs)

    out = {"forward + backward": gpu_ms(both, samples=7, warmup=2), "forward, no gradients": gpu_ms(forward, 7, 1)}
    gc.collect(), torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    out["peak memory, results included"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return out


def floors(case, fn, inputs, ms, width) -> list[dict]:
    """Return the ratio to the time of the GEMMs alone, and of the kernel between them to the time of its bytes."""
    launched = kernels(lambda: torch.autograd.grad(fn(*inputs), inputs[:2]), calls=2)
    print(case, {name: (n, round(us)) for name, (n, us) in launched.items() if us > 50}, flush=True)
    between = sum(us for name, (_, us) in launched.items() if "losses_kernel" in name or "statistics" in name) / 1e3
    moved = 2 * T * width * 2
    return [
        row(case, "three products, a second", "TFLOP/s", FLOPS * width / V / ms / 1e9, PEAK, "an 8192^3 product", None, True),
        row(
            *(case, "logits to gradients: bytes at least moved, a second", "TB/s"),
            *(moved / between / 1e9, copy_tb_s(), "a copy", None, True),
        ),
    ]  # fmt: skip


UNITS = {"peak memory, results included": "GiB"}  # the rest is in ms


def full_size():
    hidden, weight, labels, _ = loss_inputs((T,), H, V, V, dtype=torch.bfloat16, device="cuda")
    labels[-1] = 0
    return hidden.requires_grad_(), weight.requires_grad_(), labels, torch.ones(T, device="cuda")


def times(peers: dict, inputs) -> list[dict]:
    rows, measured = [], {name: measure(fn, inputs) for name, fn in peers.items()}
    for name in list(measured)[1:]:
        for metric, mine in measured["ours"].items():
            rows.append(row("whole vocabulary", metric, UNITS.get(metric, "ms"), mine, measured[name][metric], name))
    return rows + floors("whole vocabulary", peers["ours"], inputs, measured["ours"]["forward + backward"], V)


def other_ways(inputs) -> list[dict]:
    """Ours with Megatron's fp32 gradients to add to, and on one of two ranks' slices."""
    hidden, weight, *rest = inputs
    buffer = torch.zeros(V, H, device="cuda")
    into_buffer = measure(ours(grad_weight_buffer=buffer), inputs)
    del buffer
    half = (hidden, weight.detach()[: V // 2].clone().requires_grad_(), *rest)
    one_of_two = ours(vocab_parallel=mirror_vocab_parallel())
    part = measure(one_of_two, half)
    floor = floors("one rank of two", one_of_two, half, part["forward + backward"], V // 2)
    return [
        row(case, metric, UNITS.get(metric, "ms"), mine)
        for case, results in (("whole vocabulary, added to fp32 gradients", into_buffer), ("one rank of two", part))
        for metric, mine in results.items()
    ] + floor


if __name__ == "__main__":
    peers, inputs = versions(), full_size()
    rows = times(peers, inputs)
    write_gpu("linear_cross_entropy", rows)
    rows += other_ways(inputs)
    write_gpu("linear_cross_entropy", rows)
    del inputs
    rows += errors(peers)
    write_gpu("linear_cross_entropy", rows)
