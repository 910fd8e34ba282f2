"""Agreement of all ranks on the outcome of their work on a checkpoint: if one rank fails, all raise its error, at the same point.

The messages are sent over gloo groups of their own, so that a background thread can exchange them while the training thread
uses other groups. If a rank dies meanwhile, gloo reports the closed connection at once.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.checkpoint.format import CheckpointError


def raise_first(errors: list[UserError | None]) -> None:
    """Raise the first rank's error, if there is one, with the rank's number where there are several ranks."""
    for rank, error in enumerate(errors):
        if error is not None:
            raise error if len(errors) == 1 else type(error)(f"rank {rank}: {error}")


class RankAgreement:
    """Lets the ranks agree on an outcome. Create it on all ranks in the same order."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None

    def settle(self, work: Callable[[], None]) -> None:
        """Run `work` on this rank and wait for all ranks. Every rank calls it.

        Raises:
            UserError: on all ranks alike, the error of the first rank that failed.
            Exception: this rank's own error, if it is none for users.
        """
        failure: Exception | None = None
        try:
            work()
        except Exception as error:  # noqa: BLE001 - raised below, when the other ranks know
            failure = error
        errors = self._gather(failure)
        if failure is not None and not isinstance(failure, UserError):
            raise failure
        raise_first(errors)

    def _gather(self, failure: Exception | None) -> list[UserError | None]:
        told = failure
        if failure is not None and not isinstance(failure, UserError):
            told = CheckpointError(f"the checkpoint was not written: {failure!r}")
        errors: list[UserError | None] = [told]  # type: ignore[list-item]
        if self._group is not None:
            errors *= self._group.size()
            dist.all_gather_object(errors, told, group=self._group)
        return errors


class StepVotes:
    """Tells all ranks after the same step that a condition has become true on each of them.

    The votes of a step are counted during the next one, so that no rank waits.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._votes: tuple[torch.Tensor, dist.Work | None] | None = None

    def unanimous(self, vote: bool) -> bool:
        """Return whether all ranks had voted True at the previous call. Every rank calls it once per step."""
        result = self.drain()
        votes = torch.tensor([int(vote)], dtype=torch.int32, device="cpu")
        work = None
        if self._group is not None:
            work = dist.all_reduce(votes, dist.ReduceOp.MIN, group=self._group, async_op=True)
        self._votes = (votes, work)
        return result

    def drain(self) -> bool:
        """Wait for the votes of the previous call and return whether all were True. Every rank calls it."""
        if self._votes is None:
            return False
        (votes, work), self._votes = self._votes, None
        if work is not None:
            work.wait()
        return bool(votes)
