"""A checkpoint trained under any layout is the same model in transformers, and a converted model is the same under any layout."""

import pytest
import torch

from megatron_hybrid.convert.verify import verify
from testing import jobs
from testing.models import hybrid
from tests.convert import jobs as convert_jobs
from tests.convert.folders import weights, write_folder
from tests.convert.test_huggingface import equal, to_ours, to_theirs

MODEL = hybrid("GA", 48, 6, 8)  # TP4 pads its heads to 8
STEPS = 12
TRAIN = dict(steps=STEPS, global_batch_size=8, micro_batch_size=4, dtype="fp32")
LAYOUTS = {
    "TP2xPP2": dict(tensor_parallel_size=2, pipeline_parallel_size=2),
    "TP4 with padded heads": dict(tensor_parallel_size=4),
    "CP2xTP2": dict(context_parallel_size=2, tensor_parallel_size=2),
}
TOKENS = torch.randint(0, 131, (2, 40), generator=torch.Generator().manual_seed(3))


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    "layout", [pytest.param(layout, marks=[] if layout == "TP2xPP2" else [pytest.mark.slow]) for layout in LAYOUTS]
)
def test_trained_model_is_the_same_in_transformers(layout, ranks, tmp_path):
    from transformers import AutoModelForCausalLM

    settings = dict(model=MODEL, parallel=LAYOUTS[layout], train=TRAIN, steps=STEPS)
    run = ranks.run(jobs.curve, 4, **settings, save=str(tmp_path / "run"))
    assert run[0]["losses"][-1] < run[0]["losses"][0] - 0.1  # it has learnt something
    checkpoint = run[0]["path"]
    assert not verify(checkpoint_path := tmp_path / "run" / f"step-{STEPS:08d}").problems
    assert str(checkpoint_path) == checkpoint

    assert to_theirs(checkpoint, tmp_path / "export") == 0

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export", attn_implementation="eager").eval()
    prompt = TOKENS[:, :8]
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        continued = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
    (ours,) = ranks.run(convert_jobs.logits, 1, checkpoint=checkpoint, tokens=TOKENS)
    (greedy,) = ranks.run(convert_jobs.logits, 1, checkpoint=checkpoint, tokens=prompt, new_tokens=12)
    logits = ours["logits"][..., :131]
    assert relative_error(logits, expected) < 1e-5
    assert (logits - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    assert torch.equal(greedy["tokens"], continued)
    assert not verify(checkpoint_path, tmp_path / "export").problems


@pytest.mark.parametrize(
    "parallel", [dict(tensor_parallel_size=2), dict(distributed_optimizer=False)], ids=["TP2 x DP2", "plain optimizer"]
)
def test_fp32_weights_of_a_bf16_run_are_its_masters(parallel, ranks, tmp_path):
    count = 4 if "tensor_parallel_size" in parallel else 2
    train = dict(steps=2, global_batch_size=4, micro_batch_size=1, dtype="bf16")
    run = ranks.run(jobs.curve, count, model=MODEL, parallel=parallel, train=train, steps=2, save=str(tmp_path / "run"))
    assert to_theirs(run[0]["path"], tmp_path / "fp32", "--dtype", "fp32") == 0
    assert to_theirs(run[0]["path"], tmp_path / "bf16") == 0
    precise, rounded = weights(tmp_path / "fp32"), weights(tmp_path / "bf16")
    assert precise.keys() == rounded.keys()
    finer = 0
    for name, weight in precise.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight.to(rounded[name].dtype), rounded[name]), name
        finer += int((weight != rounded[name].float()).any())
    assert finer > len(precise) // 2, "weights that were rounded on the way"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_their_model_is_the_same_under_any_layout(layout, ranks, tmp_path):
    peer = write_folder(tmp_path / "hf", MODEL)
    assert to_ours(tmp_path / "hf", tmp_path / "ours") == 0
    with torch.no_grad():
        expected = peer(TOKENS).logits
    checkpoint = str(tmp_path / "ours")

    (alone,) = ranks.run(convert_jobs.logits, 1, checkpoint=checkpoint, tokens=TOKENS)
    assert relative_error(alone["logits"][..., :131], expected) < 1e-5
    if "PP" not in layout:
        shared = ranks.run(convert_jobs.logits, 4, checkpoint=checkpoint, tokens=TOKENS, parallel=LAYOUTS[layout])
        logits, tp = [r["logits"] for r in shared], LAYOUTS[layout]["tensor_parallel_size"]
        slices = [torch.cat(logits[first : first + tp], dim=-1) for first in range(0, 4, tp)]
        together = torch.cat(slices, dim=1)[..., :131]
        assert relative_error(together, expected) < 1e-5

    saved = ranks.run(
        convert_jobs.load_and_save,
        4,
        checkpoint=checkpoint,
        folder=str(tmp_path / "run"),
        parallel=LAYOUTS[layout],
        train={},
    )
    assert saved[0]["state"] == {}
    again = tmp_path / "run/step-00000001"
    assert not verify(again, tmp_path / "hf").problems
    assert to_theirs(again, tmp_path / "hf2") == 0
    assert to_theirs(checkpoint, tmp_path / "hf3") == 0
    assert equal(weights(tmp_path / "hf2"), weights(tmp_path / "hf3"))
