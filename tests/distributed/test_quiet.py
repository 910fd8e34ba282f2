"""Output of libraries that is silenced, and other output, which is not."""

import subprocess
import sys
import textwrap

NOISE = """
import ctypes, os, sys
from megatron_hybrid.distributed.quiet import without_user_buffer_banners
libc = ctypes.CDLL(None)
print("before")
with without_user_buffer_banners():
    print("!!! [UB] Number of TP groups: 1")
    libc.puts(b"!!! [UB] Create Userbuffers Communicator")
    libc.puts(b"UB_TIMEOUT is set to 3600 sec, 5940000000000 cycles, freq: 1650000khz")
    os.write(2, b"UB: warning region 1 size 60 MB registered without MC access\\n!!! [UBP2P] UBuf 3\\n")
    libc.puts(b"an error of C")
    os.write(2, b"UB: an error\\n")
    {end}
print("after")
"""


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)


def test_banners_of_user_buffers_are_removed_and_other_lines_pass():
    done = run(NOISE.format(end="pass"))
    assert sorted(done.stdout.split("\n")) == ["", "after", "an error of C", "before"]
    assert done.stderr == "UB: an error\n"


def test_an_error_between_the_banners_is_reported():
    done = run(NOISE.format(end="raise RuntimeError('no peer-to-peer access')"))
    assert done.returncode == 1 and "after" not in done.stdout
    assert done.stderr.startswith("UB: an error\n") and "no peer-to-peer access" in done.stderr


def test_warnings_that_no_user_can_act_on_are_silent(tmp_path):
    module = tmp_path / "site-packages" / "other_library.py"
    module.parent.mkdir()
    module.write_text('PATTERN = "\\d"\n')
    (tmp_path / "ours.py").write_text('PATTERN = "\\d"\n')
    done = run(f"""
        import sys, warnings
        from megatron_hybrid.distributed.quiet import silence_known_warnings
        silence_known_warnings()
        sys.dont_write_bytecode = True
        sys.path[:0] = [{str(module.parent)!r}, {str(tmp_path)!r}]
        import other_library
        warnings.warn("barrier(): using the device under current context. You can specify `device_id`")
        warnings.warn("Detected a JAX installation but could not find the shared object file")
        import ours
        warnings.warn("another warning")
    """)
    assert done.returncode == 0, done.stderr
    assert "another warning" in done.stderr and "ours.py" in done.stderr
    assert "barrier" not in done.stderr and "JAX" not in done.stderr and "other_library" not in done.stderr
