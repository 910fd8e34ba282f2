"""Collect these tests only under Triton's interpreter: see tests/kernels/test_triton_interpreted.py."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*"]
