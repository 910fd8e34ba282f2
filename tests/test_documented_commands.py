"""Every command in README.md and the guides runs here, is run by another test, or is marked as needing GPUs."""

import os
import shutil
import subprocess
import sys

import pytest

from testing.documented_commands import commands_of, module_and_arguments, run_documented
from testing.models import hybrid
from tests.data.files import save_tokenizer
from tests.test_documentation import GUIDES, ROOT

COMMANDS = {command: page for page in GUIDES for command in commands_of(page)}
NEEDS_GPUS = (
    "HYBRID_EXTRAS=dev,gpu source tools/env.sh",
    "RUN_DIR=/runs/a bash examples/pretrain_hybrid_7b.sh",
    "HYBRID_EXTRAS=gpu,deepspeed source tools/env.sh",
    "python tools/calibrate.py --gpu h100-80gb --output mine.yaml",
    "python tools/pretrain.py examples/configs/pretrain_hybrid_7b.yaml parallel.tensor_parallel_size=4 run_dir=/runs/a",
    "python tools/pretrain.py $ONE ",
    "ft_launcher ",
)
"""Beginnings of commands that need GPUs."""
ELSEWHERE = {
    "bash examples/pretrain_hybrid_tiny.sh": "tests/test_example_tiny.py",
    "bash tests/run.sh": ".ci/run",
    "source tools/env.sh": "tests/run.sh",
    "bash examples/pretrain_hybrid_7b.sh": "tests/slurm/conftest.py",  # with variables of the test's own
    "tools/convert_from_olmo_core.py": "tests/convert/olmo_core_files.py",
}
"""Parts of commands, and the file that runs them."""
CONTINUES = ("ONE=", "export ")
"""Options of the command before them, and settings of a variable."""
LONG = ("bash examples/stages/tiny.sh",)
"""Commands that take minutes of CPU time, whose parts tests/stages runs."""
TORCH_FREE = ("preprocess", "pretrain", "plan")
"""Commands that run in processes of their own, which start fast without torch."""


def kind(command: str) -> str:
    """Return where a command runs: `gpus`, `long`, `elsewhere`, `continued` or `here`."""
    if command.startswith(NEEDS_GPUS) or command == "bash examples/stages/7b.sh olmo_hybrid_7b":
        return "gpus"
    if command in LONG:
        return "long"
    if command.startswith(CONTINUES):
        return "continued"
    return "elsewhere" if any(part in command for part in ELSEWHERE) else "here"


HERE = [command for command in COMMANDS if kind(command) == "here"]


def local(words: list[str]) -> list[str]:
    """Return arguments with the absolute paths of the pages as paths in the current folder, and small numbers of workers."""
    places = {"/path/to/tokenizer": "tokenizer", "CONFIG": "examples/configs/pretrain_hybrid_7b.yaml", "32": "2"}
    return [places.get(word, word).replace("/runs/", "runs/") for word in words]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what the pages name: text, a tokenizer, the examples, and tokenized data."""
    import zstandard

    folder = tmp_path_factory.mktemp("documented")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "corpus").mkdir()
    text = b"".join(b'{"text": "w%d w%d w%d"}\n' % (n % 9 + 2, n % 7 + 2, n % 5 + 2) for n in range(2000))
    (folder / "corpus" / "a.jsonl.zst").write_bytes(zstandard.compress(text))
    save_tokenizer(folder / "tokenizer", [*(f"w{n}" for n in range(256)), "<eos>"], "<eos>")
    (folder / "code.txt").write_text("def read_file(path): return path\n" * 40)
    in_process(["preprocess", "code.txt", "--output", "data/tiny_validation", "--workers", "1"], folder)
    words = ["--output", "data/words", "--tokenizer", "tokenizer", "--workers", "1"]
    in_process(["preprocess", "corpus/a.jsonl.zst", *words], folder)
    return folder


def in_process(words: list[str], folder) -> str:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "megatron_hybrid.cli", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr[-2000:]}"
    return done.stdout


def test_commands_are_found():
    assert len(HERE) >= 12 and any("convert" in command for command in HERE)
    assert all(any(command.startswith(start) for command in COMMANDS) for start in CONTINUES)


@pytest.mark.parametrize("part", ELSEWHERE)
def test_what_runs_elsewhere_is_named_there(part):
    script = next(word for word in part.split() if "/" in word)
    assert script.rpartition("/")[2].removesuffix(".py") in (ROOT / ELSEWHERE[part]).read_text()


def expanded(words: list[str], folder) -> list[str]:
    """Return arguments with patterns of files replaced by the files, as a shell does."""
    found = [[str(path.relative_to(folder)) for path in folder.glob(word)] if "*" in word else [word] for word in words]
    return [word for words in found for word in words]


@pytest.mark.parametrize("command", [c for c in HERE if (m := module_and_arguments(c, ROOT)) and m[0] in TORCH_FREE])
def test_commands_without_torch_run(command, folder):
    module, words = module_and_arguments(command, ROOT)
    if module == "preprocess":
        shutil.rmtree(folder / "data" / "corpus", ignore_errors=True)
        words = [*words, "--overwrite"]  # the pages show it twice
    assert in_process([module.replace("_", "-"), *expanded(local(words), folder)], folder)


def test_commands_on_a_run(ranks, folder):
    byte_run = dict(
        run_dir="runs/tiny",
        model=hybrid("GA", 32, 2, 8, vocab_size=257, eos_token_id=256, pad_token_id=256),
        data=dict(train=[{"path": "data/tiny_validation"}], sequence_length=16),
        train=dict(steps=1, global_batch_size=2, micro_batch_size=2, dtype="fp32"),
        logging=dict(plot_interval=0, tensorboard=False),
    )
    word_run = byte_run | dict(run_dir="runs/words", data=dict(train=[{"path": "data/words"}], sequence_length=16))
    found = {command: module_and_arguments(command, ROOT) for command in HERE}
    shown = [command for command, call in found.items() if call and call[0] not in TORCH_FREE]
    calls, targets = [], {}
    for module, words in (found[command] for command in shown):
        words = local(words)
        for number, word in enumerate(words):
            if word.rstrip("/") in ("out", "averaged") and module != "verify":
                targets[word] = targets.get(word, 0) + 1
                words[number] = f"{word.rstrip('/')}-{targets[word]}"  # several pages write to it
        last = "2" if {"--last", "--moving"} & set(words) else None  # the run of the guide has four checkpoints, this one two
        calls.append((module, [last if last and word == "4" else word for word in words]))
    (results,) = ranks.run(run_documented, 1, folder=str(folder), byte_run=byte_run, word_run=word_run, calls=calls)
    wrong = {command: output[-1500:] for command, (status, output) in zip(shown, results, strict=True) if status}
    assert len(shown) >= 8 and not wrong


@pytest.mark.parametrize("command", [command for command in HERE if command.startswith("bash ")])
def test_dry_runs_of_scripts_run(command):
    assert command.endswith("--dry-run")
    variables = {"FILES": "skip"}
    done = subprocess.run(
        command.split(), cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and "sbatch" in done.stdout, done.stderr[-2000:]


def test_every_command_has_a_kind():
    unknown = [c for c in HERE if module_and_arguments(c, ROOT) is None and not c.startswith("bash ")]
    assert not unknown, "mark it as needing GPUs, or name the test that runs it"
