"""A_log and dt_bias under DeepSpeed, in fp32 next to a bf16 model.

DeepSpeed casts all parameters of a model to one dtype and flattens them together. These few (two per head) are hidden
from it. They stay attributes of their layers but are not parameters of DeepSpeed's module, and every data parallel rank
has an optimizer of its own for them.
"""

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_hybrid.arch.optimizers.spec import MASTER, OptimizerSpec
from megatron_hybrid.base.resolve import resolve
from megatron_hybrid.checkpoint.collect import OptimizerShard
from megatron_hybrid.config.train import OptimizerConfig
from megatron_hybrid.mixers.mixer import Mixer
from megatron_hybrid.train.optimizers.state import state_of


class Fp32Scalars:
    """Takes the scalars out of a model and trains them.

    All data parallel ranks do the same. Tensor parallel ranks hold different heads.
    """

    def __init__(
        self, model: nn.Module, groups: ProcessGroupCollection, spec: OptimizerSpec, settings: OptimizerConfig
    ) -> None:
        self.groups, self.spec, self.clip = groups, spec, settings.clip_grad
        found = [
            (self._take_out(mixer, name), mixer.packing[name].tensors[0].decay_group)
            for mixer in model.modules()
            if isinstance(mixer, Mixer)
            for name in mixer.fp32_parameters
        ]
        self.parameters = [parameter for parameter, _ in found]
        by_decay: dict[float, list[nn.Parameter]] = {}
        for parameter, group in found:
            by_decay.setdefault(0.0 if group in settings.no_decay else settings.weight_decay, []).append(parameter)
        self.optimizer: torch.optim.Optimizer | None = None
        if found:
            param_groups = [dict(params=parameters, weight_decay=decay) for decay, parameters in by_decay.items()]
            arguments = dict(lr=settings.lr, **spec.torch_arguments(settings))
            self.optimizer = resolve(spec.torch_class)(param_groups, **arguments)

    @staticmethod
    def _take_out(module: nn.Module, name: str) -> nn.Parameter:
        parameter = module._parameters.pop(name)
        assert parameter is not None
        object.__setattr__(module, name, parameter)  # nn.Module.__setattr__ would register it again
        return parameter

    @torch.no_grad()
    def reduce(self) -> None:
        """Average the gradients over the data parallel ranks. Call once per step, after all its micro-batches."""
        if not self.parameters:
            return
        flat = torch.cat([_gradient(p).view(-1) for p in self.parameters])
        dist.all_reduce(flat, group=self.groups.dp)
        flat /= self.groups.dp.size()
        parts = torch.split(flat, [p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            _gradient(parameter).copy_(part.view_as(parameter))

    @torch.no_grad()
    def squared_norm(self) -> float:
        """Return the sum of squares of all gradients, over the tensor parallel ranks too."""
        if not self.parameters:
            return 0.0
        total = torch.stack([_gradient(p).square().sum() for p in self.parameters]).sum()
        dist.all_reduce(total, group=self.groups.tp)
        return float(total)

    @torch.no_grad()
    def step(self, lr: float, gradient_norm: float) -> None:
        """Clip by the norm of the whole model's gradient, then update."""
        if self.optimizer is None:
            return
        scale = min(1.0, self.clip / (gradient_norm + 1e-6)) if self.clip > 0 else 1.0
        for parameter in self.parameters:
            parameter.grad = _gradient(parameter).mul_(scale)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Discard the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def shards(self) -> dict[nn.Parameter, OptimizerShard]:
        """Return each scalar and its optimizer state, whole."""
        if self.optimizer is None:
            return {}
        found = {}
        for parameter in self.parameters:
            state = state_of(self.optimizer, parameter, self.spec)
            states = {MASTER: parameter.detach(), **{name: state[name].view(-1) for name in self.spec.states}}
            found[parameter] = OptimizerShard(0, parameter.numel(), states, replicated=True)
        return found


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None, "no backward pass has run"
    return parameter.grad
