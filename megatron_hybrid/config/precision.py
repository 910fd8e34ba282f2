"""FP8 recipes of GEMMs and attention."""

from pydantic import NonNegativeInt, PositiveInt, model_validator

from megatron_hybrid.arch.fp8_recipes import FP8_RECIPES, RECOMMENDED, Fp8Recipe, Fp8RecipeName
from megatron_hybrid.base.errors import Problems
from megatron_hybrid.base.section import Section


class PrecisionConfig(Section):
    """FP8 training with Transformer Engine.

    The residual stream, norms, the delta rule, the embedding and the logits stay in train.dtype. So do the parameters, unless
    fp8_param_gather is set.
    """

    fp8_recipe: Fp8RecipeName | None = None
    """Recipe of the GEMMs in mixer projections and MLPs. None: train.dtype. delayed: scales from past steps; tensorwise: scales of
    the current tensor; blockwise: scales per 1 x 128 and 128 x 128 block."""
    fp8_attention: bool = False
    """Run softmax attention in FP8 with delayed scaling, the only recipe that supports it on Hopper."""
    num_layers_at_start_in_bf16: NonNegativeInt = 0
    """First layers whose GEMMs stay in bf16."""
    num_layers_at_end_in_bf16: NonNegativeInt = 0
    """Last layers whose GEMMs stay in bf16."""
    fp8_amax_history_len: PositiveInt = 1024
    """Length of the amax history of delayed scaling, in steps."""
    cache_fp8_weights: bool = True
    """Keep the FP8 copies of the weights, two bytes per parameter, for all micro-batches of a step. false: every micro-batch casts
    the weights again and keeps the copies until its backward pass. This saves memory only with full recompute."""
    fp8_param_gather: bool = False
    """Hold the weights of FP8 GEMMs in FP8 only. Data parallel ranks all-gather one byte per parameter instead of two, and the
    forward pass casts no weights. The optimizer holds the fp32 values, which checkpoints store."""

    @model_validator(mode="after")
    def _check(self) -> "PrecisionConfig":
        problems = Problems()
        if self.fp8_attention and not self.fp8_recipe:
            problems.add(
                "fp8_attention",
                "true needs FP8 GEMMs, whose backward pass keeps its scales; set fp8_recipe to "
                f"{RECOMMENDED.name}, or this to false",
            )
        if self.recipe is None or not self.recipe.bf16_layers:
            for field in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
                if count := getattr(self, field):
                    remedy = f"set fp8_recipe to {RECOMMENDED.name}, or this to 0"
                    problems.add(
                        field, f"{count} has no meaning with fp8_recipe = {self.fp8_recipe or 'null'}; {remedy}"
                    )
        if self.fp8_param_gather:
            self._check_fp8_param_gather(problems)
        problems.raise_if_any()
        return self

    def _check_fp8_param_gather(self, problems: Problems) -> None:
        if not self.fp8_recipe:
            remedy = f"set fp8_recipe to {RECOMMENDED.name}, or this to false"
            problems.add("fp8_param_gather", f"true needs FP8 GEMMs, whose weights it holds; {remedy}")
        if not self.cache_fp8_weights:
            remedy = "set it to true, or fp8_param_gather to false"
            problems.add(
                "cache_fp8_weights", f"false has no meaning with fp8_param_gather: no weight is cast; {remedy}"
            )

    @property
    def recipe(self) -> Fp8Recipe | None:
        """The entry of `fp8_recipe` in the table of recipes."""
        return None if self.fp8_recipe is None else FP8_RECIPES[self.fp8_recipe]

    @property
    def norm_casts(self) -> bool:
        """True if Transformer Engine's norms in front of FP8 GEMMs write FP8 themselves."""
        return self.recipe is not None and self.recipe.norm_casts

    @property
    def fp8(self) -> bool:
        """True if anything runs in FP8."""
        return self.fp8_recipe is not None
