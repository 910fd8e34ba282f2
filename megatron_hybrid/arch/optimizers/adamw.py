"""AdamW (Loshchilov and Hutter, arXiv 1711.05101): Adam with decoupled weight decay."""

from typing import Any

from megatron_hybrid.arch.optimizers.spec import OptimizerSpec, Settings


class AdamW(OptimizerSpec):
    """Declaration of AdamW."""

    def torch_arguments(self, settings: Settings) -> dict[str, Any]:
        return {"betas": settings.betas, "eps": settings.eps}

    def megatron_fields(self, settings: Settings) -> dict[str, Any]:
        beta1, beta2 = settings.betas
        return {"optimizer": "adam", "adam_beta1": beta1, "adam_beta2": beta2, "adam_eps": settings.eps}


SPEC = AdamW(
    name="adamw",
    states=("exp_avg", "exp_avg_sq"),
    torch_class="torch.optim.AdamW",
    host_class="deepspeed.ops.adam.DeepSpeedCPUAdam",
)
