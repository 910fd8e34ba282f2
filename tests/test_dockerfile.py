"""The Dockerfile, as far as it can be tested without building it: its base, its pins, what it copies, what it runs."""

import fnmatch
import importlib.util
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.test_packaging import requirements, tracked_files

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
    """Return True if .dockerignore leaves a path out. Its patterns here are plain, or begin with **/."""
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


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in shlex.split(" ".join(of("ENV"))))


def test_tools_env_sh_installs_everything_beside_the_image_s_torch():
    extras = environment()["HYBRID_EXTRAS"].split(",")
    assert set(extras) <= requirements().keys() and "gpu" in extras and "dev" not in extras
    assert environment()["PIP_CONSTRAINT"] == "/workspace/megatron_hybrid/constraints.txt"
    commands = of("RUN")
    assert not any("pip install" in command or "apt" in command for command in commands)
    assert environment()["HYBRID_SYSTEM_SITE_PACKAGES"] == "1"
    assert "HYBRID_SYSTEM_SITE_PACKAGES" in (ROOT / "tools" / "env.sh").read_text()
    assert shell_commands()[0].startswith("python docker/check_image.py --constraints constraints.txt")
    assert shell_commands()[1:3] == [
        "source tools/env.sh",
        'source tools/env.sh && python docker/check_image.py --extras "$HYBRID_EXTRAS"',
    ]


def test_what_it_says_of_torch_is_what_is_required():
    (torch,) = (r for r in requirements()[""] if r.name == "torch")
    said = re.search(r"last image of PyTorch (\d+\.\d+)", (ROOT / "Dockerfile").read_text())
    assert said and torch.specifier.contains(f"{said[1]}.0")


@pytest.fixture
def check_image(monkeypatch):
    """`docker/check_image.py` as in an image: `check_image(torch="2.11.0a0+1234.nv26.03")` sets versions that it finds."""
    spec = importlib.util.spec_from_file_location("check_image", ROOT / "docker" / "check_image.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    real = module.version

    def look(name: str) -> str:
        found = module.found.get(name, real)
        if found is None:
            raise module.PackageNotFoundError(name)
        return found if isinstance(found, str) else real(name)

    def within(**versions: str | None):
        module.found = {name.replace("_", "-"): value for name, value in versions.items()}
        return module

    monkeypatch.setattr(module, "version", look)
    monkeypatch.setattr(module, "requires", lambda name: ["torch<2.14,>=2.10", "numpy>=2", 'mpi4py>=4; extra == "mpi"'])
    return within


NVIDIA = "2.11.0a0+eb65b36914.nv26.03"


def test_the_image_s_torch_fits_and_stays(check_image):
    image = check_image(torch=NVIDIA, triton=None, mpi4py=None)
    assert image.problems([]) == [] and [line.split(",")[0] for line in image.problems(["mpi"])] == [
        "mpi4py is not installed"
    ]
    pins = [
        "# exact versions",
        "torch==2.11.0",
        "nvidia-nccl-cu13==2.28.9",
        "cuda-bindings==13.0.1",
        "torchmetrics==1.0",
        "numpy==2.5.5",
    ]
    assert image.constraints(pins) == [f"torch=={NVIDIA}", "torchmetrics==1.0", "numpy==2.5.5"]


@pytest.mark.parametrize(
    ("found", "says"), [("2.9.1", "torch 2.9.1 does not fit"), ("2.14.0a0+12.nv26.09", "does not fit")]
)
def test_another_torch_is_refused(check_image, found, says):
    (problem,) = check_image(torch=found).problems([])
    assert says in problem


def test_two_copies_of_torch_are_refused(check_image, monkeypatch):
    image = check_image(torch=NVIDIA)
    copies = [SimpleNamespace(name="torch", version=NVIDIA), SimpleNamespace(name="Torch", version="2.11.0")]
    monkeypatch.setattr(image, "distributions", lambda: copies)
    assert image.problems([]) == [f"2 copies of torch are installed: {NVIDIA}, 2.11.0"]


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


@pytest.mark.parametrize("script", shell_commands()[1:-1])  # the first and the last write files of the image
def test_what_it_runs_runs_here(script):
    script = script.replace("$HYBRID_EXTRAS", "")  # those of the tests' own environment, which has no GPU's
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
