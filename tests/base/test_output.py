"""Tools whose output is a closed pipe end like other Unix tools."""

import subprocess
import sys

import pytest

from megatron_hybrid.base.command import process_arguments
from megatron_hybrid.base.output import CLOSED_PIPE

PROGRAM = """
import sys
from megatron_hybrid.base.output import quiet_on_closed_pipe
sys.stdin.read()  # until the pipe is closed
with quiet_on_closed_pipe():
    {body}
"""


def run_with_closed_output(*words: str, stream: str = "stdout") -> tuple[int, str]:
    """Return the status of a process one of whose streams is a closed pipe, and what it writes to the other."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(words, **pipes) as process:
        getattr(process, stream).close()
        process.stdin.close()
        text = (process.stderr if stream == "stdout" else process.stdout).read()
        return process.wait(60), text


@pytest.mark.parametrize(
    "body", ["print('a')", "print('a', flush=True)", "print('a'); sys.exit(78)", "print('a' * 100_000)"]
)
def test_a_closed_pipe_ends_a_tool_quietly(body):
    assert run_with_closed_output(sys.executable, "-c", PROGRAM.format(body=body)) == (CLOSED_PIPE, "")


def test_a_closed_standard_error_does_too():
    body = "print('a', file=sys.stderr, flush=True)"
    command = (sys.executable, "-c", PROGRAM.format(body=body))
    assert run_with_closed_output(*command, stream="stderr") == (CLOSED_PIPE, "")


def test_another_broken_pipe_is_a_bug():
    program = PROGRAM.format(body="raise BrokenPipeError('a worker')")
    done = subprocess.run([sys.executable, "-c", program], input="", capture_output=True, text=True)
    assert done.returncode == 1 and "a worker" in done.stderr


def test_commands_end_quietly():
    assert run_with_closed_output(*process_arguments(["--help"])) == (CLOSED_PIPE, "")
