"""Files of a folder. Every file that is not read is excluded by a pattern, reported as an error, or counted.

Links to files and folders are followed. Each folder is read once, and a link adds no file that was taken already, so
loops end and no document is read twice. Hidden files and folders are like any others.
"""

import os
import re
from collections.abc import Sequence
from fnmatch import translate
from typing import NamedTuple

from megatron_hybrid.data.errors import BadRecord, DataError
from megatron_hybrid.data.outputs import FileId, file_id
from megatron_hybrid.data.records import ReadOptions, Skipped


class FoundFile(NamedTuple):
    """File of a folder."""

    path: str
    info: os.stat_result


class Patterns:
    """Shell patterns, matched with a file's name and with its path from the folder, in which `*` crosses slashes."""

    def __init__(self, include: Sequence[str], exclude: Sequence[str]):
        self.include, self.exclude = include, exclude
        self.unmatched = set(include) | set(exclude)
        """Patterns without a match so far."""
        self._regexes = {pattern: re.compile(translate(pattern)) for pattern in self.unmatched}
        self._include, self._exclude = _join(include), _join(exclude)
        self._include_any_case = _join(include, re.IGNORECASE)
        self._subtrees = [pattern for pattern in exclude if pattern.endswith("*")]

    def selects(self, path: str) -> bool:
        """Return True if the file is selected."""
        if not _matches(self._include, path):
            return False
        if self.unmatched:
            self._note(path)
        return not _matches(self._exclude, path)

    def differs_in_case(self, path: str) -> bool:
        """Return True if the file would be selected with case-insensitive patterns."""
        return _matches(self._include_any_case, path) and not _matches(self._exclude, path)

    def excludes_folder(self, path: str) -> bool:
        """Return True if --exclude matches everything below a folder."""
        found = [pattern for pattern in self._subtrees if self._regexes[pattern].match(path + "/")]
        self.unmatched.difference_update(found)
        return bool(found)

    def _note(self, path: str) -> None:
        self.unmatched = {pattern for pattern in self.unmatched if not _matches(self._regexes[pattern], path)}


def _join(patterns: Sequence[str], flags: int = 0) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, patterns)) or r"(?!)", flags)


def _matches(regex: re.Pattern[str], path: str) -> bool:
    return bool(regex.match(path) or ("/" in path and regex.match(path[path.rindex("/") + 1 :])))


def walk(folder: str, patterns: Patterns, options: ReadOptions, skipped: Skipped) -> list[FoundFile]:
    """Return the files below a folder that the patterns select, sorted by their path from it.

    Raises:
        DataError: no file is selected; unless options say skip, also a folder that cannot be read, or a link whose
            name is selected and whose target is missing.
    """
    found = _Walk(folder, patterns, options, skipped).run()
    if not found:
        also = " and is not excluded" if patterns.exclude else ""
        raise DataError(f"{folder}: no file matches {', '.join(patterns.include)}{also}{_case_hint(skipped)}")
    return [FoundFile(os.path.join(folder, path), found[path]) for path in sorted(found, key=os.fsencode)]


def refuse_unmatched(patterns: Patterns, skipped: Skipped) -> None:
    """Raise DataError if a pattern of --include matched no file of any folder."""
    if unmatched := [pattern for pattern in patterns.include if pattern in patterns.unmatched]:
        raise DataError(f"--include {' '.join(unmatched)}: matches no file{_case_hint(skipped)}")


def _case_hint(skipped: Skipped) -> str:
    count = skipped.files["name_in_other_case"]
    return f" ({count} would match in another case)" if count else ""


class _Walk:
    """Walk through a folder. `run` is called once."""

    def __init__(self, folder: str, patterns: Patterns, options: ReadOptions, skipped: Skipped):
        self._folder, self._patterns, self._options, self._skipped = folder, patterns, options, skipped
        self._found: dict[str, os.stat_result] = {}
        self._links: list[str] = []
        self._folders: set[FileId] = set()
        self._taken: set[FileId] = set()

    def run(self) -> dict[str, os.stat_result]:
        """Return the selected files by their path from the folder."""
        self._read_folders("")
        while self._links:  # after the real files, so that these are taken under their own names
            self._links.sort(reverse=True)
            self._follow(self._links.pop())
        return self._found

    def _read_folders(self, first: str) -> None:
        waiting = [first]
        while waiting:
            path = waiting.pop()
            for entry in self._entries(path):
                name = f"{path}/{entry.name}" if path else entry.name
                if entry.is_symlink():
                    self._links.append(name)
                elif entry.is_dir():
                    if not self._patterns.excludes_folder(name):
                        waiting.append(name)
                elif self._patterns.selects(name):
                    self._take(name, entry.stat(), entry.is_file())
                elif self._patterns.differs_in_case(name):
                    self._skipped.add("name_in_other_case")

    def _take(self, name: str, info: os.stat_result, is_file: bool) -> None:
        if is_file:
            self._found[name] = info
            self._taken.add(file_id(info))
        else:  # opening a pipe would wait for its writer
            self._skipped.add("special_file")

    def _entries(self, path: str) -> list[os.DirEntry[str]]:
        folder = os.path.join(self._folder, path)
        try:
            identity = file_id(os.stat(folder))
            if identity in self._folders:
                self._skipped.add("link_to_folder_already_read")
                return []
            self._folders.add(identity)
            with os.scandir(folder) as entries:
                return list(entries)
        except OSError as error:
            self._leave_out(f"{folder}: cannot be read: {error.strerror}", "unreadable_folder")
            return []

    def _follow(self, name: str) -> None:
        path = os.path.join(self._folder, name)
        if os.path.isdir(path):
            if not self._patterns.excludes_folder(name):
                self._read_folders(name)
        elif not os.path.exists(path):
            if self._patterns.selects(name):
                self._leave_out(f"{path}: a link to a file that is missing", "dangling_link")
            elif not self._patterns.differs_in_case(name) and not self._patterns.excludes_folder(name):
                self._skipped.add("dangling_link")  # perhaps of a folder, on a disk that is not mounted
        elif self._patterns.selects(name):
            info = os.stat(path)
            if file_id(info) in self._taken:
                self._skipped.add("link_to_file_already_taken")
            else:
                self._take(name, info, os.path.isfile(path))
        elif self._patterns.differs_in_case(name):
            self._skipped.add("name_in_other_case")

    def _leave_out(self, message: str, kind: str) -> None:
        error = BadRecord(message, kind)
        if not self._options.skips(kind):
            raise error
        self._skipped.add(kind)
