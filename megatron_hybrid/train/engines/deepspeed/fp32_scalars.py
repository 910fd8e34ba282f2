"""A_log and dt_bias under DeepSpeed: fp32 beside a bf16 model.

DeepSpeed casts all parameters of a model to one dtype and flattens them together. These few (two a head) are taken out of its
sight: they stay attributes of their layers, but no parameters of its module, and have an AdamW of their own on every
data parallel rank.
"""

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_hybrid.checkpoint.collect import OptimizerShard
from megatron_hybrid.config.train import OptimizerConfig
from megatron_hybrid.mixers.mixer import Mixer


class Fp32Scalars:
    """Takes the scalars out of a model and trains them. Every data parallel rank does the same; tensor parallel ranks
    hold different heads."""

    def __init__(self, model: nn.Module, groups: ProcessGroupCollection, adam: OptimizerConfig):
        self.groups, self.clip = groups, adam.clip_grad
        self.parameters = [
            self._take_out(module, name)
            for module in model.modules()
            if isinstance(module, Mixer)
            for name in module.fp32_parameters
        ]
        decay = 0.0 if "gdn_scalars" in adam.no_decay else adam.weight_decay
        arguments = dict(lr=adam.lr, betas=adam.betas, eps=adam.eps, weight_decay=decay)
        self.optimizer = torch.optim.AdamW(self.parameters, **arguments) if self.parameters else None

    @staticmethod
    def _take_out(module: nn.Module, name: str) -> nn.Parameter:
        parameter = module._parameters.pop(name)
        object.__setattr__(module, name, parameter)  # nn.Module's own would register it again
        return parameter

    @torch.no_grad()
    def reduce(self) -> None:
        """Average the gradients over the data parallel ranks; once a step, after all its micro-batches."""
        if not self.parameters:
            return
        flat = torch.cat([p.grad.view(-1) for p in self.parameters])
        dist.all_reduce(flat, group=self.groups.dp)
        flat /= self.groups.dp.size()
        for parameter, part in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad.copy_(part.view_as(parameter))

    @torch.no_grad()
    def squared_norm(self) -> float:
        """Sum of the squares of all gradients, over the tensor parallel ranks as well."""
        if not self.parameters:
            return 0.0
        total = torch.stack([p.grad.square().sum() for p in self.parameters]).sum()
        dist.all_reduce(total, group=self.groups.tp)
        return float(total)

    @torch.no_grad()
    def step(self, lr: float, gradient_norm: float) -> None:
        """Clip by the norm of the whole model's gradient, and update."""
        if self.optimizer is None:
            return
        scale = min(1.0, self.clip / (gradient_norm + 1e-6)) if self.clip > 0 else 1.0
        for parameter in self.parameters:
            parameter.grad *= scale
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def shards(self) -> dict[nn.Parameter, OptimizerShard]:
        """Each scalar and its moments, whole."""
        found = {}
        for parameter in self.parameters:
            state = adam_state(self.optimizer, parameter)
            states = {"master": parameter.detach(), **{name: state[name].view(-1) for name in MOMENTS}}
            found[parameter] = OptimizerShard(0, parameter.numel(), states, replicated=True)
        return found


MOMENTS = ("exp_avg", "exp_avg_sq")


def adam_state(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict:
    """Adam's state of a parameter; zero before the first step, as torch's AdamW and DeepSpeed's for the host would make it."""
    state = optimizer.state[parameter]
    if "exp_avg" not in state:
        state.update({name: torch.zeros_like(parameter.detach()) for name in MOMENTS})
        state["step"] = step_count(optimizer, parameter, 0)
    return state


def step_count(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, count: int) -> int | torch.Tensor:
    """A number of steps in the form that the optimizer keeps it in."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return count
    fused = any(group.get("fused") for group in optimizer.param_groups)
    return torch.full((), float(count), device=parameter.device if fused else "cpu")
