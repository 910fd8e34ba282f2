"""What every section of a run's configuration has in common."""

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """A frozen section of the configuration.

    An unknown field, a NaN or an infinity is an error, and so is a value of another type: `"12"`, `1.0` and `true` are
    not whole numbers. Lists are taken for tuples (those fields say `strict=False`; what they hold stays strict).
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
