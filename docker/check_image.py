"""Check that an image's packages fit this project, and print the constraints that keep its PyTorch. The Dockerfile runs it.

NVIDIA's images bring their own builds of PyTorch, Triton and NCCL. A second PyTorch from PyPI would take 5 GB and lack their patches.
"""

import argparse
import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

KEPT = ("torch", "triton", "pytorch-triton")
"""Distributions of the image that stay as they are. The packages of NVIDIA's CUDA libraries come with them."""
PROJECT = "megatron-hybrid"


def constraints(lines: Iterable[str]) -> list[str]:
    """Return the project's constraints, with the image's versions of what it brings, and without NVIDIA's libraries."""
    own = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    others = [line for line in own if not re.match(rf"({'|'.join(KEPT)}|nvidia-[\w-]+|cuda-[\w-]+)\s*==", line)]
    return [f"{name}=={found}" for name in KEPT if (found := installed(name))] + others


def installed(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def fits(requirement: Requirement, found: str) -> bool:
    """Return True if a version satisfies a requirement. NVIDIA's 2.11.0a0+1234.nv26.03 counts as release 2.11.0."""
    return bool(requirement.specifier.contains(Version(found).base_version, prereleases=True))


def problems(extras: list[str]) -> list[str]:
    """Return what is wrong with the installed versions, one line each.

    Args:
        extras: extras of the project that the image has.
    """
    wrong = []
    for text in requires(PROJECT) or ():
        requirement = Requirement(text)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        found = installed(requirement.name)
        if found is None:
            wrong.append(f"{requirement.name} is not installed, and {PROJECT} needs {requirement.specifier}")
        elif not fits(requirement, found):
            wrong.append(f"{requirement.name} {found} does not fit {requirement.specifier}")
    copies = [one.version for one in distributions() if re.sub(r"[-_.]+", "-", one.name).lower() == "torch"]
    if len(copies) != 1:
        wrong.append(f"{len(copies)} copies of torch are installed: {', '.join(copies)}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constraints", type=Path, metavar="FILE", help="print this file's constraints for the image")
    parser.add_argument("--extras", default="", help="extras whose packages must be there: gpu,mpi (default: none)")
    a = parser.parse_args()
    if a.constraints:
        print("\n".join(constraints(a.constraints.read_text().splitlines())))
        return 0
    found = problems([extra for extra in a.extras.split(",") if extra])
    for line in found:
        print(f"check_image: {line}", file=sys.stderr)
    return 78 if found else 0


if __name__ == "__main__":
    sys.exit(main())
