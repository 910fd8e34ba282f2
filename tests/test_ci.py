""".ci/run: it installs what tests need where it may, continues where it may not, and calls the README's command."""

import os
import re
import subprocess
from types import SimpleNamespace

from tests.conftest import LONGEST, NO_CUDA, skips_by_reason


def install(root, tmp_path, **commands: str) -> subprocess.CompletedProcess:
    """Run .ci/system_packages.sh where only these commands exist; apt-get records its words."""
    (tmp_path / "bin").mkdir()
    needed = {"bash": "", "mktemp": "", "rm": "", "tail": "", "env": "", "grep": ""}
    for name in needed:
        found = subprocess.run(
            ["bash", "-c", f"type -P {name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        (tmp_path / "bin" / name).symlink_to(found)
    for name, body in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!{tmp_path}/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    script = tmp_path / "system_packages.sh"  # without the folders of daemons, which this machine may have
    script.write_text((root / ".ci" / "system_packages.sh").read_text().replace(":/usr/sbin:/sbin", ""))
    env = {"PATH": str(tmp_path / "bin"), "RECORD": str(tmp_path / "record"), "TMPDIR": str(tmp_path)}
    return subprocess.run(["bash", script], env=env, capture_output=True, text=True, timeout=60)


def test_what_is_missing_is_installed_and_a_package_that_is_not_there_is_reported(root, tmp_path):
    apt = 'echo "$@" >>"$RECORD"\nif [ "${*: -1}" = munge ]; then echo "E: no munge"; exit 100; fi'
    here = {"id": "echo 0", "true": "", "gcc": "", "g++": "", "mpirun": "", "apt-get": apt}
    done = install(root, tmp_path, **here)
    assert done.returncode == 0 and "munge cannot be installed: E: no munge" in done.stderr
    words = (tmp_path / "record").read_text().splitlines()
    packages = [line.split()[-1] for line in words if line.startswith("install")]
    assert packages == ["slurm-wlm", "munge", "libpmix-dev", "libopenmpi-dev", "libaio-dev"]


def test_without_the_right_to_install_tests_are_skipped_and_this_is_no_error(root, tmp_path):
    done = install(root, tmp_path, id="echo 1000", sudo="exit 1", **{"apt-get": 'echo "$@" >>"$RECORD"'})
    assert done.returncode == 0 and "cannot be installed here" in done.stderr and not (tmp_path / "record").exists()


def test_it_calls_the_command_of_the_readme_with_all_extras_that_tests_use(root):
    text = (root / ".ci" / "run").read_text()
    assert "bash tests/run.sh" in (root / "README.md").read_text() and text.rstrip().endswith('bash tests/run.sh "$@"')
    extras = set(re.search(r"^extras=(\S+)$", text, re.MULTILINE)[1].split(","))
    assert {"dev", "mpi", "olmo-core", "parquet", "tasks"} <= extras and "gpu" not in extras
    assert os.access(root / ".ci" / "run", os.X_OK)


def test_skips_are_grouped_by_reason():
    reasons = [NO_CUDA, "Skipped: no mpirun here", f"Skipped: {NO_CUDA}", NO_CUDA]
    found = skips_by_reason(SimpleNamespace(longrepr=("a.py", 1, reason)) for reason in reasons)
    assert list(found.items()) == [(NO_CUDA, 3), ("no mpirun here", 1)]


def test_the_files_that_are_begun_first_exist(root):
    assert len(set(LONGEST)) == len(LONGEST)
    assert [name for name in LONGEST if not (root / "tests" / name).is_file()] == []
