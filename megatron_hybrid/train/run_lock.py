"""A lock that lets only one run use a run folder at a time.

The lock is a file, because run folders are on network file systems, where `flock` is often local to a node. Its owner
rewrites it every `BEAT_S` seconds. A lock whose owner has died is taken over: immediately if the owner ran on this host,
otherwise after `PATIENCE_S` seconds without a rewrite.
"""

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_hybrid.base.errors import BAD_INPUT, UserError
from megatron_hybrid.base.process import ProcessIdentity

LOCK = "run.lock"
BEAT_S = 10.0
PATIENCE_S = 45.0


class RunFolderError(UserError):
    """Another run uses or has used the folder. The message names the folder and the remedy."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock, as recorded in its file."""

    token: str
    process: ProcessIdentity
    user: str
    job: str
    attempt: int
    """Number of times that SLURM had restarted the job."""
    since: str
    beat: int = 0

    @classmethod
    def this_process(cls, env: Mapping[str, str] = os.environ) -> "Owner":
        return cls(
            token=uuid.uuid4().hex,
            process=ProcessIdentity.current(),
            user=env.get("USER") or str(os.getuid()),
            job=env.get("SLURM_JOB_ID", ""),
            attempt=int(env.get("SLURM_RESTART_COUNT") or 0),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
        )

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.process.pid} of {self.user} on {self.process.host}{job}, since {self.since}"

    def has_ended(self, now: "Owner") -> bool | None:
        """Return whether the owner's process has ended; None if this host cannot tell."""
        if self.job and self.job == now.job and self.attempt < now.attempt:
            return True  # SLURM restarts a job only when its earlier attempt has ended
        return self.process.has_ended()


def read_owner(path: Path) -> Owner | None:
    """Return the owner that a lock file names; None if there is no file or it is damaged.

    Raises:
        OSError: the file cannot be read, so its owner is unknown.
    """
    try:
        fields = json.loads(path.read_text())
        return Owner(**fields | {"process": ProcessIdentity(**fields["process"])})
    except (FileNotFoundError, ValueError, TypeError, LookupError):
        return None


class RunLock:
    """Context manager that holds a run folder. One process per run enters it.

    Args:
        run_dir: the run's folder, which is created if it is missing.
        say: prints a line, when a lock is taken over.

    Raises:
        RunFolderError: on entering, if another run holds the folder, or the folder cannot be read or written.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None] = print):
        self.path, self.say = run_dir / LOCK, say
        self.owner = Owner.this_process()
        self._temporary = self.path.with_name(f".{LOCK}.{self.owner.token}")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="run lock", daemon=True)

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._remove_if_dead()
        except OSError as error:
            reason = f"{self.path} cannot be read or written: {error.strerror}"
            remedy = "check its permissions and the free space there, or give the run another run_dir"
            raise RunFolderError(f"run_dir: {reason}; {remedy}") from error
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(OSError):  # the next run takes over the lock of a process that has ended
            self._temporary.unlink(missing_ok=True)
            owner = read_owner(self.path)
            if owner and owner.token == self.owner.token:
                self.path.unlink()

    def _create(self) -> bool:
        """Create the lock file with its content in one step: `link` fails if the file exists, also on NFS."""
        self._temporary.write_text(json.dumps(asdict(self.owner)))
        try:
            os.link(self._temporary, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            return self._create_exclusively()
        finally:
            self._temporary.unlink(missing_ok=True)
        return True

    def _create_exclusively(self) -> bool:
        try:
            with open(self.path, "x") as file:
                file.write(json.dumps(asdict(self.owner)))
        except FileExistsError:
            return False
        return True

    def _remove_if_dead(self) -> None:
        """Remove the lock of a run that has ended; raise if that run still works."""
        found = read_owner(self.path)
        if found is None and not self.path.exists():
            return
        dead = found.has_ended(self.owner) if found else None
        if dead is None:
            self.say(f"{self.path} is held by {found or 'a process it does not name'}: watching whether it is alive")
            dead = self._stays_the_same(found)
        if not dead:
            raise RunFolderError(
                f"run_dir: {self.path.parent} is in use by {found}; give this run another run_dir, or stop that one. "
                f"If it is certain that it has ended, remove {self.path}"
            )
        aside = self.path.with_name(f".{LOCK}.{self.owner.token}.dead")
        try:
            os.replace(self.path, aside)  # if two processes take over, one finds no file here
        except FileNotFoundError:
            return
        unchanged = False
        try:
            unchanged = read_owner(aside) == found
        finally:
            if not unchanged:  # another process had taken it over already, or it cannot be read
                os.replace(aside, self.path)
        if not unchanged:
            return
        aside.unlink()
        self.say(f"took over {self.path.parent}: {found or 'the process that held it'} has ended")

    def _stays_the_same(self, found: Owner | None) -> bool:
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until and self.path.exists():
            time.sleep(1.0)
            if read_owner(self.path) not in (found, None):
                return False
        return True

    def _keep(self) -> None:
        """Rewrite the lock until the run ends. End the process if another one has taken over the folder.

        A lock that is missing, damaged or cannot be read belongs to nobody else: the run continues.
        """
        while not self._ended.wait(BEAT_S):
            try:
                owner = read_owner(self.path)
                if owner and owner.token != self.owner.token:
                    text = f"run_dir: {self.path.parent} was taken over by {owner}; ending without a save"
                    print(text, file=sys.stderr, flush=True)
                    os._exit(BAD_INPUT)
                self._rewrite()
            except OSError:  # such as a full disk: the next rewrite may succeed, and training does not need it
                continue

    def _rewrite(self) -> None:
        self.owner = replace(self.owner, beat=self.owner.beat + 1)
        self._temporary.write_text(json.dumps(asdict(self.owner)))
        os.replace(self._temporary, self.path)
