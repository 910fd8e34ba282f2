"""Build the corpus of the scaling law: source code of well-known packages, a BPE tokenizer of its own, and tokens.

1. Download the wheels of packages.txt with pip, and check their SHA-256.
2. Write their source files as JSON lines, each file once: train.jsonl; files.jsonl, a hash's choice of files; packages.jsonl, whole
   packages that training does not see.
3. Train a byte-level BPE tokenizer on a part of the training text.
4. Tokenize the sets with the project's preprocess command, and report bytes and tokens in corpus.json.

The result depends on the list and the options alone. To resume, call it again: finished parts stay.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), str(HERE)]

from packages import Package, download, read_list, text_files  # noqa: E402

from megatron_hybrid.base.errors import UserError, no_traceback  # noqa: E402
from megatron_hybrid.base.numbers import positive  # noqa: E402
from megatron_hybrid.config.command_line import CommandLine  # noqa: E402

SETS = ("train", "files", "packages")
"""Training set, and validation sets of files and of whole packages."""
FILE_SHARE, PACKAGE_SHARE = 0.005, 0.06
"""Shares of the files and of the packages that the validation sets get."""
END = "<|endoftext|>"
TOKENIZER_BYTES = 100 << 20
"""Training text that the tokenizer is trained on."""

Say = Callable[[str], None]


def share(text: str) -> float:
    """Return a number in [0, 1) that the text's hash determines."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def set_of(package: str, text: str) -> str:
    """Return the set of a file."""
    if share(f"package {package}") < PACKAGE_SHARE:
        return "packages"
    return "files" if share(f"file {text}") < FILE_SHARE else "train"


def write_text(packages: Sequence[Package], wheels: Path, folder: Path, say: Say) -> dict[str, Any]:
    """Write the JSON lines of all sets, and return their files and bytes.

    A text that occurs several times is written once, where it comes first.
    """
    seen, files, sizes, of_package = set[bytes](), Counter[str](), Counter[str](), Counter[str]()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        outputs = {name: stack.enter_context(open(folder / f"{name}.jsonl.tmp", "w")) for name in SETS}
        for package in packages:
            for name, text in text_files(wheels / package.file):
                data = text.encode()
                digest = hashlib.sha256(data).digest()
                if digest in seen:
                    continue
                seen.add(digest)
                found = set_of(package.name, text)
                outputs[found].write(json.dumps({"source": f"{package.name}/{name}", "text": text}) + "\n")
                files[found] += 1
                sizes[found] += len(data)
                of_package[package.name] += len(data)
            say(f"{package.file}: {of_package[package.name] / 1e6:.1f} MB of text")
    for name in SETS:
        os.replace(folder / f"{name}.jsonl.tmp", folder / f"{name}.jsonl")
    return {"files": dict(files), "bytes": dict(sizes), "bytes_of_packages": dict(of_package)}


def texts(path: Path, most_bytes: int) -> Iterator[str]:
    """Yield evenly spread texts of JSON lines, about `most_bytes` in all."""
    total = path.stat().st_size
    with path.open() as lines:
        for line in lines:
            text = json.loads(line)["text"]
            if total <= most_bytes or share(f"tokenizer {text}") < most_bytes / total:
                yield text


def train_tokenizer(source: Path, folder: Path, vocab_size: int, most_bytes: int = TOKENIZER_BYTES) -> None:
    """Train a byte-level BPE tokenizer, and write it as transformers reads it.

    Raises:
        UserError: the text has fewer tokens than the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(source, most_bytes), trainer)
    if (found := tokenizer.get_vocab_size()) != vocab_size:
        raise UserError(
            f"--vocab-size: {vocab_size}: the text has only {found} tokens; give at most that, or more packages"
        )
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer.save(str(partial / "tokenizer.json"))
    settings = {"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    (partial / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")
    os.replace(partial, folder)


def tokenize(folder: Path, name: str, workers: int) -> None:
    """Tokenize a set with the preprocess command, which writes the dataset at once or not at all.

    Raises:
        UserError: the command failed.
    """
    text, output, tokenizer = (str(folder.resolve() / part) for part in (f"text/{name}.jsonl", name, "tokenizer"))
    command = [sys.executable, "tools/preprocess_data.py", text, "--output", output, "--tokenizer", tokenizer]
    if subprocess.run([*command, "--workers", str(workers), "--sha256", "--overwrite"], cwd=ROOT).returncode:
        raise UserError(f"{name}: the preprocess command failed; its message is above")


def build(
    packages: Sequence[Package], folder: Path, vocab_size: int, workers: int, say: Say, wheels: Path | None = None
) -> dict[str, Any]:
    """Build the corpus, or what is missing of it, and return its report.

    Raises:
        UserError: a part fails, or the folder holds a corpus of another list or vocabulary.
    """
    identity = {"packages": [f"{package.sha256}  {package.file}" for package in packages], "vocab_size": vocab_size}
    _claim(folder / "identity.json", identity)
    wheels = wheels or folder / "wheels"
    written = folder / "text" / "written.json"
    if not written.exists():
        for package in packages:
            download(package, wheels)
        report = write_text(packages, wheels, folder / "text", say)
        _write_json(written, report)
    report = json.loads(written.read_text())
    if not (folder / "tokenizer").exists():
        say("training the tokenizer")
        train_tokenizer(folder / "text" / "train.jsonl", folder / "tokenizer", vocab_size)
    for name in SETS:
        if not (folder / f"{name}.json").exists():
            tokenize(folder, name, workers)
    summaries = {name: json.loads((folder / f"{name}.json").read_text()) for name in SETS}
    report |= {key: {name: summary[key] for name, summary in summaries.items()} for key in ("tokens", "sha256")}
    _write_json(folder / "corpus.json", report)
    return report


def _claim(path: Path, identity: dict[str, Any]) -> None:
    """Record the list and options of a folder, or compare them with those recorded before."""
    if path.exists() and json.loads(path.read_text()) != identity:
        raise UserError(
            f"{path.parent}: holds a corpus of other packages or another vocabulary; give another --output, or remove it"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_json(path, identity)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--list", type=Path, default=HERE / "packages.txt", help="wheels and their SHA-256 (default: %(default)s)")
    add("--output", type=Path, default=ROOT / "data" / "scaling", help="folder of the corpus (default: %(default)s)")
    add("--wheels", type=Path, help="folder of the downloads (default: wheels in the folder of the corpus)")
    add("--vocab-size", type=positive, default=16384, help="tokens, with the end of documents (default: 16384)")
    cores = len(os.sched_getaffinity(0))
    add("--workers", type=positive, default=cores, help="processes (default: the cores there are)")
    add("--record", action="store_true", help="write files, bytes and tokens to benchmarks/results")
    arguments = parser.parse(argv)
    with no_traceback():
        packages = read_list(arguments.list)
        report = build(packages, arguments.output, arguments.vocab_size, arguments.workers, print, arguments.wheels)
    for name in SETS:
        print("{}: {:,} files, {:,} bytes, {:,} tokens".format(name, *(value for _, value in counts_of(report, name))))
    if arguments.record:
        record(report)
    return 0


def counts_of(report: dict[str, Any], name: str) -> list[tuple[str, int]]:
    """Return files, bytes and tokens of a set."""
    return [(kind, report[kind].get(name, 0)) for kind in ("files", "bytes", "tokens")]


def record(report: dict[str, Any]) -> None:
    """Write the result file from which docs/results/paper.md shows the corpus."""
    from report import row, write

    rows = [row(name, kind, "", value) for name in SETS for kind, value in counts_of(report, name)]
    rows += [row(name, "sha256", "", report["sha256"][name]) for name in SETS]
    notes = [f"{len(report['bytes_of_packages'])} packages; the SHA-256 is that of the file of tokens"]
    write("scaling_corpus", rows, ("tokenizers",), None, notes, command="python examples/scaling/corpus.py --record")


if __name__ == "__main__":
    sys.exit(main())
