"""The corpus of examples/scaling, from small wheels in a local folder: what is read, the sets, resuming, and pip's check of hashes."""

import hashlib
import json
import stat
import sys
import zipfile

import numpy as np
import pytest

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.data.tokenizer import load_tokenizer


@pytest.fixture
def corpus(root):
    sys.path.insert(0, str(root / "examples" / "scaling"))
    try:
        import corpus

        yield corpus
    finally:
        sys.path.pop(0)


def source(number: int, lines: int = 12) -> str:
    """A module that differs from all others."""
    names = [f"value_{(number * 7 + i) % 23}" for i in range(lines)]
    return "".join(f"def {name}(argument):\n    return argument + {number * i}\n" for i, name in enumerate(names))


def make_wheel(folder, name: str, files: dict, extra=()) -> "tuple[str, str]":
    """A wheel that pip accepts; SHA-256 and file name."""
    folder.mkdir(exist_ok=True)
    file = f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    about = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(folder / file, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in {**files, **about}.items():
            archive.writestr(zipfile.ZipInfo(member), content)
        for member, content in extra:
            archive.writestr(member, content)
    return hashlib.sha256((folder / file).read_bytes()).hexdigest(), file


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.fixture
def wheels(tmp_path):
    """Twelve packages with 300 modules, and the list of them."""
    lines = []
    for package in range(12):
        files = {f"pkg{package}/m{number:02}.py": source(25 * package + number) for number in range(25)}
        lines.append("  ".join(make_wheel(tmp_path / "wheels", f"pkg{package}", files)))
    (tmp_path / "packages.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "wheels"


def test_only_source_files_inside_the_archive_are_read(corpus, tmp_path):
    good = {
        "a/z.py": source(1),
        "a/b.h": source(2),
        "README.md": source(3),
        "a/exactly.py": "x" * 999 + "\n" + "y" * 1000,
    }
    left_out = {
        "a/data.csv": source(4), "a/binary.py": source(5) + "\0", "a/latin.py": "é".encode("latin-1") * 100, "a/tiny.py": "x = 1\n",
        "a/minified.py": "y" * 1001, "a/large.py": "# line\n" * 200_000, "x-1.0.dist-info/NOTES.md": source(6), "/abs.py": source(7),
        "../up.py": source(8), "a/../../up.py": source(9),
    }  # fmt: skip
    _, file = make_wheel(tmp_path / "w", "x", good | left_out, [(link("a/link.py"), source(10))])
    found = dict(corpus.text_files(tmp_path / "w" / file))
    assert found == good and list(found) == sorted(good)
    (tmp_path / "w" / file).write_bytes(b"PK damaged")
    with pytest.raises(UserError, match=f"{file}: cannot be read .*; remove it, and run the command again"):
        list(corpus.text_files(tmp_path / "w" / file))


def test_a_size_in_the_header_is_not_believed(corpus, tmp_path):
    _, file = make_wheel(tmp_path / "w", "x", {"a/large.py": "# line\n" * 200_000})
    path = tmp_path / "w" / file
    data, size = path.read_bytes(), (1_400_000).to_bytes(4, "little")
    assert data.count(size) >= 1
    path.write_bytes(data.replace(size, (1000).to_bytes(4, "little")))
    try:
        found = dict(corpus.text_files(path))
    except UserError:
        found = {}
    assert all(len(text) <= 1000 for text in found.values())


def records(folder, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "text" / f"{name}.jsonl").read_text().splitlines()]


def build(corpus, tmp_path, wheels, output: str, **changes):
    packages = corpus.read_list(tmp_path / "packages.txt")
    return corpus.build(packages, tmp_path / output, changes.get("vocab_size", 300), 1, lambda line: None, wheels)


@pytest.mark.slow
def test_a_corpus_is_the_same_again_and_after_an_interruption(corpus, tmp_path, wheels, monkeypatch):
    monkeypatch.setattr(corpus, "FILE_SHARE", 0.1)
    monkeypatch.setattr(corpus, "PACKAGE_SHARE", 0.2)
    with monkeypatch.context() as broken:
        broken.setattr(corpus, "tokenize", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        for output in ("one", "two"):
            with pytest.raises(KeyboardInterrupt):
                build(corpus, tmp_path, wheels, output)
    for name in ("tokenizer/tokenizer.json", "text/train.jsonl", "text/files.jsonl", "text/packages.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    before = (tmp_path / "one" / "tokenizer" / "tokenizer.json").stat().st_mtime_ns
    report = build(corpus, tmp_path, wheels, "one")
    assert (tmp_path / "one" / "tokenizer" / "tokenizer.json").stat().st_mtime_ns == before, "finished parts stay"
    assert build(corpus, tmp_path, wheels, "one") == report
    _check_sets(corpus, tmp_path / "one", report)
    with pytest.raises(UserError, match="another vocabulary; give another --output"):
        build(corpus, tmp_path, wheels, "one", vocab_size=301)


def _check_sets(corpus, folder, report) -> None:
    texts = {name: records(folder, name) for name in corpus.SETS}
    packages = {name: {record["source"].split("/")[0] for record in found} for name, found in texts.items()}
    assert packages["packages"] and not packages["packages"] & (packages["train"] | packages["files"])
    everything = [record["text"] for found in texts.values() for record in found]
    assert len(everything) == len(set(everything)) == sum(report["files"].values()) == 300
    assert report["bytes"]["train"] == sum(len(record["text"].encode()) for record in texts["train"])
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert tokenizer.vocab_size == 300
    expected = [id_ for record in texts["files"] for id_ in [*tokenizer.encode(record["text"]), tokenizer.eos_token_id]]
    assert np.fromfile(folder / "files.bin", "uint16").tolist() == expected
    assert report["tokens"]["files"] == len(expected)
    sizes = tokenizer.token_bytes()
    assert sum(sizes[token] for token in expected) == report["bytes"]["files"]


def test_a_text_that_occurs_twice_is_written_once(corpus, tmp_path):
    files = {name: {f"{name}/m.py": source(1), f"{name}/n.py": source(ord(name))} for name in "ab"}
    lines = [make_wheel(tmp_path / "wheels", name, of_package) for name, of_package in files.items()]
    (tmp_path / "packages.txt").write_text("".join("  ".join(line) + "\n" for line in lines))
    packages = corpus.read_list(tmp_path / "packages.txt")
    report = corpus.write_text(packages, tmp_path / "wheels", tmp_path / "text", lambda line: None)
    assert sum(report["files"].values()) == 3
    assert report["bytes_of_packages"] == {"a": len(source(1)) + len(source(97)), "b": len(source(98))}


def test_pip_downloads_what_the_list_has_and_nothing_else(corpus, tmp_path, monkeypatch):
    digest, file = make_wheel(tmp_path / "index", "pkg", {"pkg/m.py": source(1)})
    for name in ("INDEX_URL", "EXTRA_INDEX_URL", "CONSTRAINT"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    import packages

    good = packages.Package(digest, file)
    target = packages.download(good, tmp_path / "wheels")
    assert [path.name for path in (tmp_path / "wheels").iterdir()] == [file]
    target.write_bytes(b"damaged")
    assert packages.file_sha256(packages.download(good, tmp_path / "wheels")) == digest
    with pytest.raises(UserError, match="pip cannot download it: .*(HASH|HASHES|hash|Got)"):
        packages.download(packages.Package("0" * 64, file), tmp_path / "other")
    assert not list((tmp_path / "other").glob("*.whl"))


def test_the_list_of_the_project(corpus, root):
    found = corpus.read_list(root / "examples" / "scaling" / "packages.txt")
    assert 30 <= len(found) <= 60 and all(package.file.endswith(".whl") for package in found)
    of_abi = next(package for package in found if package.name == "astropy")
    assert of_abi.tags[:6] == ["--implementation", "cp", "--python-version", "3.12", "--abi", "abi3"]
    held_out = [package.name for package in found if corpus.share(f"package {package.name}") < corpus.PACKAGE_SHARE]
    assert 1 <= len(held_out) <= 6


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("abc  a-1.0-py3-none-any.whl", "line 1: is no SHA-256"),
        ("0" * 64 + "  a-1.0.tar.gz", "line 1: is no SHA-256"),
        ("0" * 64 + "  ../a-1.0-py3-none-any.whl", "line 1: is no SHA-256"),
        (("0" * 64 + "  a-1.0-py3-none-any.whl\n") * 2, "a is listed twice"),
    ],
)
def test_wrong_lists_name_the_line(corpus, tmp_path, text, error):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=error):
        corpus.read_list(tmp_path / "list.txt")
