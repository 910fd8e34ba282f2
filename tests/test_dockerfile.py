"""The Dockerfile, as far as it can be tested without building it: its base, its pins, what it copies, what it runs."""

import fnmatch
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.test_packaging import locked, requirements, tracked_files

ROOT = Path(__file__).resolve().parent.parent


def instructions() -> list[tuple[str, str]]:
    """(name, rest) of each instruction, continued lines joined, comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (name, rest.strip()) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())
    ]


def of(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def shell_commands() -> list[str]:
    """The script of each `RUN bash -c '...'`."""
    return [words[2] for words in map(shlex.split, of("RUN")) if words[:2] == ["bash", "-c"]]


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a path out; its patterns here are plain, or begin with **/."""
    parts = Path(path).parts
    prefixes = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    for pattern in (ROOT / ".dockerignore").read_text().split():
        deep = pattern.removeprefix("**/")
        candidates = parts if deep != pattern else prefixes
        if any(
            fnmatch.fnmatchcase(candidate, deep) and candidate.count("/") == deep.count("/") for candidate in candidates
        ):
            return True
    return False


def test_the_base_is_one_release_of_nvidia_s_pytorch():
    (base,) = of("FROM")
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", base)


def test_versions_come_from_the_constraints():
    """Everything is installed by tools/env.sh, from extras that pyproject.toml has; the Dockerfile names no version of its own."""
    environment = dict(pair.split("=", 1) for pair in shlex.split(" ".join(of("ENV"))))
    extras = environment["HYBRID_EXTRAS"].split(",")
    assert set(extras) <= requirements().keys() and {"gpu", "dev"} <= set(extras)
    assert environment["PIP_CONSTRAINT"] == "", "or NVIDIA's builds would stand against the pins"
    assert "transformer-engine" in {r.name for r in requirements()["gpu"]}
    commands = " ".join(of("RUN"))
    assert "pip" not in commands.replace("-k pins", "") and "==" not in commands and "apt" not in commands
    assert shell_commands()[0] == "source tools/env.sh"


def test_what_it_says_of_torch_is_the_pin():
    said = re.search(r"last image of PyTorch (\d+\.\d+)", (ROOT / "Dockerfile").read_text())
    assert said and locked("constraints.txt")["torch"].startswith(f"{said[1]}.")


def test_it_runs_as_a_user():
    names = [name for name, _ in instructions()]
    (user,) = of("USER")
    assert user not in ("root", "0") and f"useradd --create-home --uid 10001 {user}" in of("RUN")[0]
    assert names.index("USER") < names.index("COPY") and all(f"--chown={user}" in copy for copy in of("COPY"))


def test_what_is_copied_exists_and_is_not_ignored():
    for copy in of("COPY"):
        *sources, _ = [word for word in copy.split() if not word.startswith("--")]
        assert sources and all((ROOT / source).exists() for source in sources)
    lost = [str(p.relative_to(ROOT)) for p in tracked_files() if ignored(str(p.relative_to(ROOT)))]
    assert not lost, ".dockerignore leaves out tracked files"
    for path in (".venv/bin/python", ".git/HEAD", "runs/a/x", "tests/__pycache__/a.pyc", "megatron_hybrid.egg-info/x"):
        assert ignored(path), path
    assert not ignored("megatron_hybrid/data/build.py") and not ignored("examples/configs/pretrain_hybrid_7b.yaml")


def test_the_readme_s_two_commands_are_in_the_image():
    readme = (ROOT / "README.md").read_text()
    for command in ("bash examples/pretrain_hybrid_tiny.sh", "bash tests/run.sh"):
        script = command.split()[1]
        assert command in readme and (ROOT / script).exists() and not ignored(script)
        assert f"megatron-hybrid {command}" in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("script", shell_commands())
def test_what_it_runs_runs_here(script):
    environment = {k: v for k, v in os.environ.items() if k != "HYBRID_EXTRAS"}  # this machine's own extras
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
