"""Imports without garbage collections: none runs in the block, and none traverses later what it left."""

import gc
import subprocess
import sys

import pytest

from megatron_hybrid.base.permanent_imports import permanent_imports


class Node:
    """An object that collections traverse."""


def collections() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())


def test_no_collection_traverses_what_is_imported():
    with permanent_imports():
        before = collections()
        nodes = [Node() for _ in range(20_000)]
        assert collections() == before
    assert gc.isenabled() and gc.get_freeze_count() >= len(nodes)
    assert not any(isinstance(found, Node) for found in gc.get_objects())


def test_collections_that_were_off_stay_off():
    gc.disable()
    try:
        with permanent_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("start", ["main(['average', '--help'])", "run_tool(lambda: 0)"])
def test_a_command_freezes_its_imports(start):
    program = f"""
import atexit, gc
from megatron_hybrid.cli.main import main, run_tool
atexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count() > 10_000))
{start}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1:] == ["True True"], done.stdout + done.stderr
