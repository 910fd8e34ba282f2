"""Errors about data."""

from megatron_hybrid.base.errors import UserError


class DataError(UserError):
    """Unusable input or token data. The message names the file, the line or byte offset, and the remedy."""


class BadRecord(DataError):
    """Error about a document or file that `--bad-records skip` leaves out and counts under `kind`."""

    def __init__(self, message: str, kind: str):
        """kind: the key in PREFIX.json, such as `not_json`."""
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # it is raised in workers
        return type(self), (self.args[0], self.kind)

    def __str__(self) -> str:
        return f"{self.args[0]}. To leave out and count such records: --bad-records skip"

    def without_option(self) -> DataError:
        """Return the error for an input that the user named, which is never left out."""
        return DataError(self.args[0])
