"""Collect these tests only under Triton's interpreter: see tests/kernels/test_triton_interpreted.py."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    import tests.kernels.quick_interpreter  # noqa: F401

    collect_ignore_glob = []
else:
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session")
def ranks():
    """As in tests/conftest.py, with the quick interpreter."""
    from testing.ranks import RankPool

    return RankPool("tests.kernels.quick_interpreter")
