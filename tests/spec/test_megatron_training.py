"""The example that trains with megatron.training."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("megatron_training_on_cpu.py")
ARGUMENTS = """--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64
    --micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr 0.1 --lr-decay-iters 100 --lr-decay-style constant --vocab-size 128
    --make-vocab-size-divisible-by 64 --normalization RMSNorm --swiglu --disable-bias-linear --hidden-dropout 0
    --attention-dropout 0 --untie-embeddings-and-output-weights --optimizer sgd --sgd-momentum 0 --weight-decay 0
    --eval-iters 0 --eval-interval 100 --log-interval 1 --ckpt-format torch_dist --transformer-impl local
    --use-cpu-initialization --distributed-backend gloo --no-gradient-accumulation-fusion --no-persist-layer-norm
    --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-masked-softmax-fusion
    --spec layer_specs stack_spec --hybrid-layer-pattern G*"""


def figures(ranks: int, *arguments: str) -> dict[int, tuple[float, float]]:
    """Losses and gradient norms by iteration, as megatron.training logs them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(PROGRAM)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, *ARGUMENTS.split(), *arguments], env=environment, capture_output=True, text=True)
    cause = run.stderr[max(0, run.stderr.find("Traceback")) :]  # the first rank that failed, not those that lost it
    assert run.returncode == 0, cause[:6000]
    found = re.findall(r"iteration +(\d+)/.*?lm loss: (\S+).*?grad norm: (\S+)", run.stdout)
    return {int(step): (float(loss), float(norm)) for step, loss, norm in found}


@pytest.mark.slow
def test_a_run_continues_at_another_tensor_parallel_size(tmp_path):
    folder = str(tmp_path)
    expected = figures(2, *f"--tensor-model-parallel-size 2 --sequence-parallel --save {folder} --save-interval 2".split())
    found = figures(1, *f"--load {folder} --ckpt-step 2 --no-load-optim --no-load-rng".split())
    assert list(expected) == [1, 2, 3, 4] and list(found) == [3, 4]
    assert found[3] == pytest.approx(expected[3], abs=2e-5)
    # the loss logged second after a load is the mean of both steps
    assert 2 * found[4][0] - found[3][0] == pytest.approx(expected[4][0], abs=2e-5)
    assert found[4][1] == pytest.approx(expected[4][1], abs=1e-3)
