"""State of torch's random number generators on this rank."""

import torch

from megatron_hybrid.distributed.device import has_cuda


def get_random_state() -> dict[str, torch.Tensor]:
    """Return the state of the CPU generator and, with CUDA, of this rank's GPU."""
    state = {"rng.cpu": torch.get_rng_state()}
    return state | {"rng.cuda": torch.cuda.get_rng_state()} if has_cuda() else state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Restore the state."""
    torch.set_rng_state(state["rng.cpu"])
    if has_cuda() and "rng.cuda" in state:
        torch.cuda.set_rng_state(state["rng.cuda"])
