"""Train with megatron.training, as Megatron-LM's pretrain_gpt.py and pretrain_hybrid.py do, on its mock data. See README.md."""

from functools import partial
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.datasets import utils as dataset_utils
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args


def datasets(sizes: list[int], vp_stage: int | None = None):
    """megatron-core's mock training, validation and test data of these numbers of samples."""
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=None,
        split="1,1,1",
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )
    is_built_here = mpu.get_tensor_model_parallel_rank() == 0
    return BlendedMegatronDatasetBuilder(MockGPTDataset, sizes, lambda: is_built_here, config).build()


datasets.is_distributed = True  # every rank calls it: megatron-core's builder waits for all


def batch(iterator) -> dict[str, torch.Tensor]:
    """A micro-batch on this rank: the first tensor parallel rank's."""
    args = get_args()
    shape = (args.micro_batch_size, args.seq_length)
    found = {}
    sample = next(iterator) if iterator is not None else None
    source, group = mpu.get_tensor_model_parallel_src_rank(), mpu.get_tensor_model_parallel_group()
    for name in ("tokens", "labels", "position_ids", "loss_mask"):
        dtype = torch.float32 if name == "loss_mask" else torch.int64
        found[name] = torch.empty(shape, dtype=dtype, device="cuda") if sample is None else sample[name].cuda()
        torch.distributed.broadcast(found[name], source, group=group)
    return found


def loss_of(mask: torch.Tensor, losses: torch.Tensor):
    """The sum of losses, the number of tokens, and both to be reported."""
    total, tokens = (losses.float() * mask).sum(), mask.sum().to(torch.int)
    return total, tokens, {"lm loss": torch.stack((total.detach(), tokens.float()))}


def forward_step(iterator, model):
    """One micro-batch forward."""
    x = batch(iterator)
    losses = model(x["tokens"], x["position_ids"], None, labels=x["labels"])
    return losses, partial(loss_of, x["loss_mask"])


def use_compiled_helpers() -> None:
    """Skip the `make` that megatron.training runs (megatron/training/initialize.py:178) where there is no makefile.

    The megatron-core wheel holds the compiled dataset helpers and no makefile. A Megatron-LM checkout compiles as usual.
    """
    if not Path(dataset_utils.__file__).with_name("Makefile").exists():
        dataset_utils.compile_helpers = lambda: None


if __name__ == "__main__":
    use_compiled_helpers()
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    model = (hybrid_config_from_args if args.hybrid_layer_pattern else gpt_config_from_args)(args)
    config = pretrain_cfg_container_from_args(args, model)
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)
