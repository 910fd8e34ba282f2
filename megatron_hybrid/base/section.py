"""Base class of the sections of a run's configuration."""

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """A frozen section of the configuration.

    Unknown fields, NaN, infinities and values of another type are errors: `"12"`, `1.0` and `true` are not whole numbers.
    Tuple fields accept lists by `strict=False`; their entries stay strict.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        strict=True,
        allow_inf_nan=False,
    )

    @classmethod
    def fields(cls) -> dict[str, FieldInfo]:
        """Return all fields by name, with those that are known only while the process runs."""
        return cls.model_fields
