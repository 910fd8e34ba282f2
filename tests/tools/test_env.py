"""tools/env.sh with a Python whose installations are only recorded: one environment per selection, none changed, GPUs looked for."""

import os
import re
import shutil
import subprocess

import pytest

PYTHON = """#!/bin/bash
# A Python that makes environments of itself and records what pip would install.
case "$*" in
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "PATH=$3/bin:\\$PATH" >"$3/bin/activate" ;;
"-m pip "*) echo "$(dirname "$(dirname "$0")") $*" >>"$PIP_LOG"; [ -z "${PIP_FAILS:-}" ] ;;
*) exit 0 ;;
esac
"""

UTILITIES = ("bash", "basename", "cat", "cksum", "cp", "date", "dirname", "env", "flock", "grep", "ls", "mkdir", "rm", "sed", "tail",
             "touch", "tr")  # fmt: skip


@pytest.fixture
def source_env(root, tmp_path):
    """`source_env(**variables)`: status, chosen environment and stderr of `source tools/env.sh` in a copy of the project's folder."""
    project = tmp_path / "project"
    (project / "tools").mkdir(parents=True)
    for name in ("tools/env.sh", "pyproject.toml", "constraints.txt", "constraints-olmo-core.txt"):
        shutil.copy(root / name, project / name)
    python = tmp_path / "python3"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(**variables: str) -> tuple[int, str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HYBRID_")}
        environment = inherited | {"HYBRID_PYTHON": str(python), "PIP_LOG": str(tmp_path / "pip.log")} | variables
        command = ["bash", "-c", f"source {project}/tools/env.sh && command -v python"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout.strip(), done.stderr

    run.project, run.log = project, tmp_path / "pip.log"
    return run


def test_an_environment_is_made_once_from_the_constraints(source_env):
    status, python, err = source_env()
    assert status == 0 and re.search(r"/\.venv/dev-[0-9a-f]{8}/bin/python$", python) and "ready after" in err
    assert "-c constraints.txt --no-build-isolation -e .[dev]" in source_env.log.read_text()
    assert source_env() == (0, python, "")


def test_other_extras_and_other_requirements_leave_an_environment_as_it_is(source_env):
    first = source_env()[1]
    before = source_env.log.read_text()
    production = source_env(HYBRID_EXTRAS="gpu", HYBRID_ALLOW_NO_GPU="1")[1]
    lock = source_env.project / "constraints.txt"
    lock.write_text(lock.read_text() + "# changed\n")
    status, second, err = source_env()
    assert status == 0 and len({first, production, second}) == 3 and first.split("/")[-3] in err
    installed = source_env.log.read_text().removeprefix(before)
    assert installed and first.removesuffix("/bin/python") not in installed
    assert "dev" not in "".join(line for line in installed.splitlines() if "/gpu-" in line)


def test_settings_of_tools_need_no_new_environment(source_env):
    first = source_env()
    project = source_env.project / "pyproject.toml"
    project.write_text(project.read_text().replace("line-length = 120", "line-length = 121"))
    assert source_env()[1] == first[1]


def test_olmo_core_has_constraints_of_its_own_and_no_extras_are_possible(source_env):
    assert source_env(HYBRID_EXTRAS="dev,olmo-core")[0] == 0 == source_env(HYBRID_EXTRAS="")[0]
    log = source_env.log.read_text()
    assert "-c constraints-olmo-core.txt --no-build-isolation -e .[dev,olmo-core]" in log
    assert "-c constraints.txt --no-build-isolation -e .\n" in log


@pytest.fixture
def bare_path(tmp_path) -> str:
    """A PATH with the usual utilities, but neither nvidia-smi nor sbatch."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in UTILITIES:
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return str(folder)


def test_a_machine_without_a_gpu_is_told_so_before_anything_is_installed(source_env, bare_path):
    status, _, err = source_env(HYBRID_EXTRAS="dev,gpu", PATH=bare_path)
    assert status != 0 and "nvidia-smi finds none here; nothing was installed" in err and not source_env.log.exists()
    assert not (source_env.project / ".venv").exists()


@pytest.mark.parametrize(("name", "prints"), [("nvidia-smi", "GPU 0: NVIDIA H100"), ("sbatch", "")])
def test_a_machine_with_a_gpu_or_a_cluster_gets_the_gpu_extra(source_env, bare_path, tmp_path, name, prints):
    command = tmp_path / "bin" / name
    command.write_text(f"#!/bin/bash\necho '{prints}'\n")
    command.chmod(0o755)
    status, python, _ = source_env(HYBRID_EXTRAS="gpu", PATH=bare_path)
    assert status == 0 and "/.venv/gpu-" in python
    assert source_env.log.read_text().splitlines()[-1].endswith("-e .[gpu]")


def test_a_failed_installation_is_made_again(source_env):
    status, _, err = source_env(PIP_FAILS="yes")
    assert status != 0 and "could not be made" in err
    assert source_env()[0] == 0
