"""Predict the time of collectives from where their ranks are.

Ranks are numbered tensor parallel first, then context, data, pipeline (distributed/process_groups.py). A group inside one
node communicates over NVLink. A group that spans nodes runs rings through the network, and each of its GPUs in a node has
its share of the bandwidth. A ring is as fast as its slowest link, and its latency adds up hop by hop.
"""

from dataclasses import dataclass

from megatron_hybrid.planner.hardware import Hardware
from megatron_hybrid.planner.plan import Plan


@dataclass(frozen=True)
class Group:
    """Communicating ranks."""

    ranks: int
    ranks_per_node: int

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)


def groups(plan: Plan, gpus_per_node: int) -> dict[str, Group]:
    """Return a plan's tensor, context, data (with context) and pipeline parallel groups. The last is two neighbors."""
    tp, cp, dp = plan.tp, plan.cp, plan.dp_cp
    neighbors_share_a_node = plan.world_size <= gpus_per_node
    return {
        "tp": Group(tp, min(tp, gpus_per_node)),
        "cp": Group(cp, max(1, min(cp, gpus_per_node // tp))),
        "dp": Group(dp, max(1, min(dp, gpus_per_node // tp))),
        "pp": Group(min(plan.pp, 2), min(plan.pp, 2) if neighbors_share_a_node else 1),
    }


def hops(operation: str, ranks: int) -> float:
    """Return the steps of a ring."""
    return {"all_reduce": 2.0 * (ranks - 1), "p2p": 1.0}.get(operation, float(ranks - 1))


def wire_bytes(operation: str, ranks: int, size: float) -> float:
    """Return the bytes that each rank sends, for a whole tensor of `size` bytes."""
    share = (ranks - 1) / ranks
    return {"all_reduce": 2 * share * size, "p2p": size}.get(operation, share * size)


def seconds(operation: str, size: float, group: Group, hardware: Hardware) -> float:
    """Return the time of one collective.

    Args:
        operation: all_reduce, all_gather, reduce_scatter or p2p. An all-to-all sends as much as an all-gather of a tensor of
            the size that each rank has.
        size: bytes of the whole tensor.
    """
    if group.ranks == 1:
        return 0.0
    wire, near = wire_bytes(operation, group.ranks, size), hardware.intra_node[operation]
    time = wire / near.bytes_per_second
    if group.nodes == 1:
        return time + hops(operation, group.ranks) * near.latency
    far = hardware.inter_node[operation]
    rounds = hops(operation, group.ranks) / max(1, group.ranks - 1)
    latency = rounds * ((group.nodes - 1) * far.latency + (group.ranks - group.nodes) * near.latency)
    return max(time, wire / (group.ranks_per_node * far.bytes_per_second)) + latency


def assumptions(hardware: Hardware) -> list[str]:
    """Return the assumptions behind a prediction, one per line."""
    far = hardware.inter_node["all_gather"]
    return [
        f"nodes of {hardware.gpus_per_node} GPUs, ranks placed tensor parallel first, then context, data, pipeline",
        f"between nodes {far.bytes_per_second / 1e9:.0f} GB/s per GPU and {far.latency * 1e6:.0f} us per hop (assumed unless the "
        "hardware file says otherwise); no congestion, no stragglers",
        "inside a node NVLink at the measured rate, whatever else runs at the same time",
        "context parallelism is predicted, not measured: all-to-alls take the rate of all-gathers, and a recurrence's second "
        "scan of a slice takes a measured share of its first",
        "both sides wait for pipeline transfers; the backward pass hides tensor parallel collectives behind GEMMs, the forward "
        "pass hides none (the gain of parallel.tp_comm_overlap is not predicted); a backward and a forward pass hide gradient "
        "reduction and parameter gathering where these overlap",
        "documents have log-normal lengths; attention runs on them at the rate of whole sequences",
        f"rates: {hardware.name}, {hardware.measured}",
    ]
