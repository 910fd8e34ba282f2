"""Host lists of SLURM, and addresses of its nodes. No torch here."""

import re
import socket
import subprocess

from megatron_hybrid.base.errors import LaunchError

_RANGES = re.compile(r"\[(\d+)(?:-\d+)?(?:,\d+(?:-\d+)?)*\]", re.ASCII)
"""`[03-17,20]`. The group is the first number with its leading zeros."""
_NAME = re.compile(r"[\w.:-]+", re.ASCII)


def first_host(nodelist: str) -> str:
    """Return the first host of a SLURM host list, as `scontrol show hostnames` does.

    `node[03-17,20],login1` gives node03; `rack[1-2]node[01-04]-ib` gives rack1node01-ib.

    Raises:
        LaunchError: the text is not a host list.
    """
    first = _RANGES.sub(r"\1", nodelist.strip()).split(",")[0]
    if not _NAME.fullmatch(first):
        raise LaunchError(f"SLURM's node list {nodelist!r} contains no host; set MASTER_ADDR to the host of rank 0")
    return first


def node_address(node: str) -> str:
    """Return the name of a SLURM node if it resolves, otherwise the NodeAddr in SLURM's configuration."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except (OSError, UnicodeError):
        pass
    try:
        shown = subprocess.run(["scontrol", "show", "node", node], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        shown = ""
    if match := re.search(r"\bNodeAddr=(\S+)", shown):
        return match[1]
    raise LaunchError(f"the first node, {node}, does not resolve; set MASTER_ADDR to an address of it")
