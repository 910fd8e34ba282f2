"""Checks of data.documents."""

from megatron_hybrid.base.errors import Problems
from megatron_hybrid.config.data import DataConfig


def check_documents(data: DataConfig, problems: Problems) -> None:
    """Refuse what the model does not support yet.

    The data and the loss are complete. Remove this check when the mixers obey document boundaries
    (docs/development/documents.md).
    """
    if data.documents != "keep":
        problems.add(
            "data.documents",
            f"{data.documents} is not implemented: the model does not obey document boundaries yet; set it to keep",
        )
