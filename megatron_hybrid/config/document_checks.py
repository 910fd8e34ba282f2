"""Checks of data.documents and data.instance_filter."""

from megatron_hybrid.base.errors import Problems
from megatron_hybrid.config.data import DataConfig


def check_documents(data: DataConfig, problems: Problems) -> None:
    """Refuse what the model and the loss do not support yet.

    The data side is complete. Remove this check when the mixers obey document boundaries and the loss is the mean over all
    counted tokens of the global batch (docs/development/documents.md).
    """
    if data.documents != "keep":
        problems.add(
            "data.documents",
            f"{data.documents} is not implemented: the model does not obey document boundaries yet; set it to keep",
        )
    if data.instance_filter is not None:
        problems.add(
            "data.instance_filter",
            "it is set, but not implemented: the loss does not weight micro-batches by their counted tokens yet; set it to null",
        )
