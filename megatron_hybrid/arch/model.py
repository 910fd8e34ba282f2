"""The network: what its layers are and how wide. How ranks share it is the layout's business."""

from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any, Self

from pydantic import ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails

from megatron_hybrid.arch.blocks import Block, Blocks, complete_blocks
from megatron_hybrid.arch.mixer import block_problems
from megatron_hybrid.arch.model_fields import Backend, ModelFields, RopeScalingConfig
from megatron_hybrid.arch.patterns import expand_pattern, fold_pattern
from megatron_hybrid.arch.registry import default_blocks, first_blocks, mixer_spec, section_classes
from megatron_hybrid.base import nearest
from megatron_hybrid.base.errors import ConfigError, Problems, join, shown

__all__ = ["Backend", "ModelConfig", "RopeScalingConfig", "fold_pattern"]


class ModelConfig(ModelFields):
    """A decoder whose layers are blocks, one per symbol of layer_pattern.

    Every registered mixer that has a config_class adds a section by the name of its prefix, such as `gdn`; it is None where
    the model has none.
    """

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="wrap")
    @classmethod
    def _validate_sections(cls, data: Any, validate_fields: ModelWrapValidatorHandler[Self]) -> Self:
        """Validate mixer sections next to the fields, and refuse names that are neither."""
        if not isinstance(data, Mapping):
            return validate_fields(data)
        given, errors = {**data}, list[InitErrorDetails]()
        for name, section in section_classes().items():
            try:
                given[name] = None if given.get(name) is None else section.model_validate(given[name])
            except ValidationError as error:
                errors += _located(error, name)
        for name in set(given) - set(cls.fields()):
            errors.append(InitErrorDetails(type="extra_forbidden", loc=(name,), input=given[name]))
        given["blocks"] = complete_blocks(given.get("blocks", {}), default_blocks(), first_blocks())
        try:
            model = validate_fields(given)
        except ValidationError as error:
            errors += _located(error)
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return model

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = Problems()
        self._check_blocks(problems)
        self._check_heads(problems)
        self._check_fields(problems)
        problems.raise_if_any()
        return self

    def _check_blocks(self, problems: Problems) -> None:
        for symbol, block in self.blocks.items():
            if len(symbol) != 1 or symbol not in ascii_uppercase:
                problems.add(join("blocks", symbol), "is not a symbol; write one capital letter, such as B")
            try:
                problems += block_problems(mixer_spec(block.mixer), block, join("blocks", symbol))
            except ConfigError as error:
                problems += [(join("blocks", symbol, field), text) for field, text in error.problems]
        if problems:
            return
        try:
            blocks = self.blocks_by_symbol
        except ValueError as error:
            problems.add("layer_pattern", str(error))
            return
        for symbol, block in blocks.items():
            problems += mixer_spec(block.mixer).check(self, block, symbol)
        self._check_rotary_factors(problems)

    def _check_fields(self, problems: Problems) -> None:
        for name in ("eos_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is not None and token >= self.vocab_size:
                most = self.vocab_size - 1
                problems.add(name, f"{token} is outside the vocabulary; give at most vocab_size - 1 = {most}, or null")
        if self.rope_scaling is not None and (self.rope_theta is None or self.rope_theta <= 1):
            problems.add(
                "rope_scaling",
                f"needs a rotary embedding to scale, and rope_theta is {shown(self.rope_theta)}; set rope_theta above 1, "
                "or rope_scaling to null",
            )

    def _check_rotary_factors(self, problems: Problems) -> None:
        factors = self._rotary_factors
        if len(set(factors.values())) > 1:
            symbol, factor = next((s, f) for s, f in factors.items() if f != self.rotary_factor)
            problems.add(
                join("blocks", symbol, "partial_rotary_factor"),
                f"{factor} differs from another block's {self.rotary_factor}, and a model has one table of angles; set both to "
                "the same",
            )

    def _check_heads(self, problems: Problems) -> None:
        heads, groups = self.num_attention_heads, self.kv_heads
        if heads % groups:
            problems.add(
                "num_key_value_heads",
                f"{groups} does not divide num_attention_heads = {heads}; the nearest is "
                f"{nearest.divisor(groups, heads)}",
            )
        if self.head_dim is None and self.hidden_size % heads:
            problems.add(
                "hidden_size",
                f"{self.hidden_size} is not a multiple of num_attention_heads = {heads}; the nearest is "
                f"{nearest.multiple(self.hidden_size, heads)}, or set head_dim",
            )
        elif self.rope_theta is not None and self.attention_head_dim % 2:
            problems.add(
                "head_dim",
                f"{self.attention_head_dim} is odd, and rotary embedding turns pairs; the nearest is "
                f"{self.attention_head_dim + 1}, or set rope_theta to null",
            )

    def __hash__(self) -> int:
        return hash((self.layer_pattern, self.hidden_size, self.vocab_size))  # blocks are a dict, which has no hash

    def architecture(self) -> dict[str, Any]:
        """Return the fields that define the model, as checkpoints store them: all but the backend."""
        return self.model_dump(mode="json", exclude={"backend"})

    @classmethod
    def fields(cls) -> dict[str, FieldInfo]:
        sections = {
            name: FieldInfo(annotation=section | None, default=None)  # type: ignore[arg-type]
            for name, section in section_classes().items()
        }
        return {**cls.model_fields, **sections}

    @property
    def known_blocks(self) -> Blocks:
        """Blocks by symbol: those that mixers bring, and this model's own."""
        return {**default_blocks(), **self.blocks}

    @property
    def layers(self) -> tuple[str, ...]:
        """The symbol of each layer, first to last."""
        return expand_pattern(self.layer_pattern, {symbol: block.title for symbol, block in self.known_blocks.items()})

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def blocks_by_symbol(self) -> Blocks:
        """The blocks that layer_pattern uses, in the order of their first layers."""
        known = self.known_blocks
        return {symbol: known[symbol] for symbol in dict.fromkeys(self.layers)}

    @property
    def _rotary_factors(self) -> dict[str, float]:
        """Share of a head's channels that the rotary embedding turns, by symbol of a block that uses it."""
        return {
            symbol: block.partial_rotary_factor
            for symbol, block in self.blocks_by_symbol.items()
            if mixer_spec(block.mixer).uses_rotary_embedding
        }

    @property
    def rotary_factor(self) -> float:
        """Share of an attention head's channels that the rotary embedding turns, the same in all layers."""
        return next(iter(self._rotary_factors.values()), 1.0)

    def block(self, index: int) -> Block:
        """Return the block of layer `index`, from 0."""
        return self.known_blocks[self.layers[index]]


def _located(error: ValidationError, *prefix: str) -> list[InitErrorDetails]:
    """Return the errors of a section, located below `prefix`."""
    return [
        InitErrorDetails(
            type=detail["type"], loc=(*prefix, *detail["loc"]), input=detail["input"], ctx=detail.get("ctx", {})
        )
        for detail in error.errors(include_url=False)
    ]
