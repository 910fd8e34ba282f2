"""Work of the first rank alone, whose result or error all ranks share."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_hybrid.base.errors import UserError, as_storage_error
from megatron_hybrid.distributed.shared_progress import SharedProgress


def on_first_rank[T](work: Callable[[], T], progress: SharedProgress | None = None) -> T:
    """Run `work` on rank 0 and return its result, or raise its error, on every rank.

    Results and errors are sent with torch.distributed's object broadcast, so they must be plain values.

    Args:
        progress: of work that may take longer than the time limit of collectives.
    """
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome = [work(), None]
        except UserError as error:
            outcome = [None, error]
        except Exception as error:  # noqa: BLE001 - raised below, when the other ranks know
            failure = error
            known = as_storage_error(error) if isinstance(error, OSError) else None
            outcome = [None, known or RuntimeError(f"rank 0: {error!r}")]
    if progress is not None:
        progress.finish()
        progress.wait()
    dist.broadcast_object_list(outcome)
    if failure is not None and not isinstance(outcome[1], UserError):
        raise failure
    if outcome[1] is not None:
        raise outcome[1] from failure
    result: T = outcome[0]
    return result
