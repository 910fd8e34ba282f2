"""Detect the number of this node in a job, for a launcher that starts the node's ranks. No torch here.

Job controllers (Kubeflow's PyTorchJob, Volcano, plain Kubernetes) set RANK and WORLD_SIZE per node. NODE_RANK and NNODES, and
torchrun's PET_NODE_RANK and PET_NNODES, have the same meaning. With mpirun and srun, one launcher runs on each node.
"""

import os
from collections.abc import Mapping

from megatron_hybrid.base.errors import LaunchError
from megatron_hybrid.launch.environment import Launch, from_step
from megatron_hybrid.launch.variables import (
    LOCAL_RANKS,
    LOCAL_SIZES,
    contradiction,
    master_port,
    number,
    port_number,
)

_NODE_RANKS = ("PET_NODE_RANK", "NODE_RANK")
_NODES = ("PET_NNODES", "NNODES")
_RANKS_PER_NODE = ("PET_NPROC_PER_NODE", "NPROC_PER_NODE")
_ONCE = "start megatron-hybrid launch once on each node"


def node_from_environment(env: Mapping[str, str] = os.environ) -> Launch:
    """Return the launch of the nodes' launchers: the rank is the node's number, the world size is the number of nodes.

    Raises:
        LaunchError: variables that are not numbers or contradict each other, several launchers on this node, or several nodes
            without a rendezvous.
    """
    _check_only_one_here(env)
    found = _from_node_variables(env) or _from_rank_variables(env)
    if found is None:
        step = from_step(env)
        return Launch(0, 0, 1, _master(env, 1)) if step is None else step.checked()
    rank, nodes = found
    if rank >= nodes:
        raise contradiction(
            env, *_NODE_RANKS, *_NODES, "RANK", "WORLD_SIZE", why=f"node {rank} is not one of 0 to {nodes - 1}"
        )
    return Launch(rank, 0, nodes, _master(env, nodes), "controller")


def check_ranks(node: Launch, ranks: int, env: Mapping[str, str] = os.environ) -> None:
    """Check the number of ranks to start on a node against the environment.

    Raises:
        LaunchError: the environment has another number of ranks, or RANK or WORLD_SIZE of another layout.
    """
    for name in _RANKS_PER_NODE:
        # torchrun also accepts auto, gpu and cpu here
        if env.get(name, "").isdecimal() and number(env, name) != ranks:
            raise LaunchError(
                f"{name}={env[name]} contradicts the {ranks} ranks to start here; set --gpus or --cpu-ranks to {env[name]}, or "
                f"unset {name}"
            )
    if node.launcher != "controller":
        return
    for name, legal in (
        ("RANK", {node.rank, node.rank * ranks}),
        ("WORLD_SIZE", {node.world_size, node.world_size * ranks}),
    ):
        if name in env and number(env, name) not in legal:
            others = " and ".join(f"{other}={env[other]}" for other in (*_NODE_RANKS, *_NODES) if other in env)
            raise LaunchError(f"{name}={env[name]} contradicts {others} with {ranks} ranks on each node; unset {name}")


def _check_only_one_here(env: Mapping[str, str]) -> None:
    """Check that this is the only launcher on the node: each of several would start all ranks."""
    for name in ("LOCAL_RANK", *LOCAL_RANKS):
        if name in env and number(env, name) > 0:
            raise LaunchError(
                f"{name}={env[name]}: megatron-hybrid launch runs several times on this node, and each would start all its "
                f"ranks; {_ONCE} "
                f"(srun --ntasks-per-node=1), or unset {name}"
            )
    sizes = LOCAL_SIZES + (("LOCAL_WORLD_SIZE",) if "LOCAL_RANK" in env else ())
    for name in sizes:
        if name in env and number(env, name) > 1:
            raise LaunchError(
                f"{name}={env[name]}: megatron-hybrid launch runs several times on this node; {_ONCE}, or start the training "
                "script itself that way"
            )


def _from_node_variables(env: Mapping[str, str]) -> tuple[int, int] | None:
    """Return node number and number of nodes by PET_NODE_RANK or NODE_RANK. None: neither is set."""
    ranks = {name: number(env, name) for name in _NODE_RANKS if name in env}
    counts = {name: _count(env, name) for name in _NODES if name in env}
    for found in (ranks, counts):
        if len(set(found.values())) > 1:
            raise contradiction(env, *found, why="set one of them, or both to the same value")
    if not ranks:
        if any(count > 1 for count in counts.values()) and "RANK" not in env:
            name = next(iter(counts))
            raise LaunchError(f"{name}={env[name]} is set and the number of this node is not; set NODE_RANK")
        return None
    rank = next(iter(ranks.values()))
    if counts:
        return rank, next(iter(counts.values()))
    if "WORLD_SIZE" in env:
        return rank, _nodes_of_world(env)
    if rank == 0:
        return 0, 1
    name = next(iter(ranks))
    raise LaunchError(f"{name}={env[name]} is set and the number of nodes is not; set NNODES")


def _count(env: Mapping[str, str], name: str) -> int:
    """Return the number of nodes in `4` or `4:4`. An elastic range is an error."""
    least, _, most = env[name].partition(":")
    if most and most != least:
        raise LaunchError(f"{name}={env[name]} is a range, and a run has a fixed number of nodes; set it to one number")
    return number({name: least}, name)


def _nodes_of_world(env: Mapping[str, str]) -> int:
    """Return the number of nodes by WORLD_SIZE, which counts processes if the number of processes per node is also set."""
    world = number(env, "WORLD_SIZE")
    for name in _RANKS_PER_NODE:
        if env.get(name, "").isdecimal():
            per_node = max(1, number(env, name))
            if world % per_node:
                raise contradiction(
                    env, "WORLD_SIZE", name, why="the number of ranks is not a multiple of the ranks per node"
                )
            return world // per_node
    return world


def _from_rank_variables(env: Mapping[str, str]) -> tuple[int, int] | None:
    """Return node number and number of nodes by RANK and WORLD_SIZE, set per node. None: they are not set."""
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return None
    if "RANK" not in env or "WORLD_SIZE" not in env:
        there, missing = ("RANK", "WORLD_SIZE") if "RANK" in env else ("WORLD_SIZE", "RANK")
        if from_step(env) is not None or env[there] == {"RANK": "0", "WORLD_SIZE": "1"}[there]:
            return None
        raise LaunchError(f"{there}={env[there]} is set and {missing} is not; set both, or unset {there}")
    step = from_step(env)
    if step is not None and step.world_size > 1:
        if (number(env, "RANK"), number(env, "WORLD_SIZE")) != (step.rank, step.world_size):
            raise LaunchError(
                f"RANK={env['RANK']} and WORLD_SIZE={env['WORLD_SIZE']} contradict {step.launcher}, which says {step.rank} of "
                f"{step.world_size}; unset them"
            )
        return None
    nodes = number(env, "WORLD_SIZE")
    for name in _NODES:
        if name in env and _count(env, name) != nodes:
            nodes = _count(env, name)  # WORLD_SIZE counts processes: `check_ranks` compares
    return number(env, "RANK"), nodes


def _master(env: Mapping[str, str], nodes: int) -> tuple[str, int] | None:
    """Return the rendezvous. None: this machine, at a free port."""
    host, port = _place(env)
    if nodes == 1:
        return None if port is None else ("127.0.0.1", port)
    if host is None:
        raise LaunchError(
            f"there are {nodes} nodes and no rendezvous is set; set MASTER_ADDR to the host of node 0, and "
            "MASTER_PORT to a free port of it, the same on all nodes"
        )
    return host, port or master_port(env)


def _place(env: Mapping[str, str]) -> tuple[str | None, int | None]:
    host = next((env[name] for name in ("MASTER_ADDR", "PET_MASTER_ADDR") if env.get(name)), None)
    port = next((port_number(env, name) for name in ("MASTER_PORT", "PET_MASTER_PORT") if name in env), None)
    if host is None and env.get("PET_RDZV_ENDPOINT"):
        name, _, at = env["PET_RDZV_ENDPOINT"].rpartition(":")
        host = name or at
        port = port or (port_number({"PET_RDZV_ENDPOINT": at}, "PET_RDZV_ENDPOINT") if name else None)
    return host, port
