"""Fault-injection campaign of checkpoints: kills inside saves, damaged files, and failing disks.

python -m tests.faults.saves --kills 200 --damages 400 --failures 0 --rows ROWS.json

Every case runs tools/pretrain.py on forked ranks (forked.py) and looks at what a user would see: exit statuses, the output, the
checkpoints that are left, and whether the run ends bit-identical to one that was not disturbed. Prints one line per part and exits
with status 1 if any case fails. `--failures 0` fails every call of a save.
"""

import argparse
import errno
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.faults import forked, tiny
from tests.faults.forked import COUNT, FAIL, KILL, Fault

STEPS = 40
"""Last step of the runs that are killed. They save after every step."""
KINDS = (("one rank", False), ("one rank", True), ("TP2", False), ("DP2", True))
"""Layout, and whether saves run in the background."""
DISK_ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)


class Campaign:
    """Counts of one part's cases and what went wrong in them.

    Args:
        folder: for runs and data.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    def expect(self, holds: bool, what: str) -> None:
        """Record a problem unless the condition holds."""
        if not holds:
            self.problems.append(what)

    def fresh(self, name: str) -> Path:
        """Return a folder name for a run, and remove what is there."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        return path

    def run(
        self, run_dir: Path, layout: str, fault: Fault | None = None, steps: int = STEPS, **fields
    ) -> forked.Outcome:
        """Run to a step, saving after every step, and check that no traceback is printed."""
        fields = {"checkpoint.interval": 1} | fields
        arguments = tiny.arguments(self.folder, run_dir, layout, steps, **fields)
        return forked.run(arguments, self.folder, tiny.LAYOUTS[layout][0], fault)


def kill_saves(campaign: Campaign, count: int) -> None:
    """Kill a random rank at random calls of its saves, resume, and kill again, until the run has reached its end."""
    references = {}
    while campaign.counts["kills"] < count:
        layout, background = KINDS[campaign.counts["runs"] % len(KINDS)]
        if layout not in references:
            done = campaign.run(run_dir := campaign.fresh("undisturbed"), layout)
            campaign.expect(
                done.codes == [0] * len(done.codes), f"undisturbed {layout}: {done.codes} {done.text[-300:]}"
            )
            references[layout] = tiny.content(tiny.newest(run_dir))
        campaign.counts["runs"] += 1
        _kill_one_run(campaign, layout, background, references[layout], count)


def _kill_one_run(campaign: Campaign, layout: str, background: bool, reference: dict, count: int) -> None:
    run_dir, name = campaign.fresh("killed"), f"{layout}{', background' if background else ''}"
    ranks = tiny.LAYOUTS[layout][0]
    while True:
        is_last = campaign.counts["kills"] >= count
        fault = None if is_last else Fault(KILL, campaign.rng.randint(1, 60), rank=campaign.rng.randrange(ranks))
        before = tiny.newest(run_dir)
        outcome = campaign.run(run_dir, layout, fault, **{"checkpoint.async_save": background})
        if (
            outcome.codes == [0] * ranks or "leaves nothing to train" in outcome.text
        ):  # killed when the last step was saved
            break
        killed = fault is not None and outcome.codes[fault.rank] == -9
        campaign.expect(killed, f"{name}: not killed, statuses {outcome.codes}: {outcome.text[-400:]}")
        if not killed:
            return
        campaign.counts["kills"] += 1
        after = tiny.newest(run_dir)
        campaign.expect(before is None or after is not None and after >= before, f"{name}: {before} was lost")
        campaign.expect(after is None or not tiny.damage_of(after), f"{name}: {after} is damaged")
        campaign.expect(None not in outcome.codes, f"{name}: a rank hung after another was killed")
    campaign.expect(not tiny.remains(run_dir), f"{name}: left {tiny.remains(run_dir)}")
    campaign.expect(
        tiny.content(tiny.newest(run_dir)) == reference, f"{name}: the end differs from the undisturbed run's"
    )


def _flip(path: Path, rng: random.Random, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _truncate(path: Path, rng: random.Random, other: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def _delete(path: Path, rng: random.Random, other: Path) -> None:
    path.unlink()


def _swap(path: Path, rng: random.Random, other: Path) -> None:
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs), other.write_bytes(mine)


DAMAGES: dict[str, Callable[[Path, random.Random, Path], None]] = {
    "flip": _flip, "truncate": _truncate, "delete": _delete, "swap": _swap,
}  # fmt: skip


def damage_files(campaign: Campaign, count: int, resumed: int) -> None:
    """Damage every kind of file in turn. The reader must refuse it; in some cases a run must fall back."""
    from megatron_hybrid.checkpoint.format import CheckpointError
    from megatron_hybrid.checkpoint.reader import CheckpointReader

    source = campaign.fresh("source")
    fields = {"checkpoint.init_from": _with_original_files(campaign)}
    done = campaign.run(source, "TP2", steps=4, **fields)
    campaign.expect(done.codes == [0, 0], f"run to damage: {done.codes}: {done.text[-300:]}")
    files = sorted(path.relative_to(tiny.newest(source)) for path in tiny.newest(source).rglob("*") if path.is_file())
    for number in range(count):
        file, kind = files[number % len(files)], list(DAMAGES)[number // len(files) % len(DAMAGES)]
        run_dir = campaign.fresh("damaged")
        shutil.copytree(source, run_dir)
        newest = tiny.newest(run_dir)
        older = newest.with_name("step-00000003")
        other = older / file if (older / file).read_bytes() != (newest / file).read_bytes() else newest / "index.json"
        DAMAGES[kind](newest / file, campaign.rng, other)
        campaign.counts["damages"] += 1
        campaign.counts[kind] += 1
        try:
            CheckpointReader(newest).close()
            campaign.expect(False, f"{kind} of {file}: not detected")
        except CheckpointError:
            pass
        if number * resumed // count != (number - 1) * resumed // count:
            _resume_damaged(campaign, run_dir, f"{kind} of {file}", is_all=kind == "swap", fields=fields)


def _with_original_files(campaign: Campaign) -> Path:
    """Return a checkpoint that keeps files of the model it was converted from."""
    run_dir = campaign.fresh("converted")
    campaign.run(run_dir, "one rank", steps=1)
    folder = tiny.newest(run_dir)
    (folder / "original").mkdir()
    (folder / "original" / "generation_config.json").write_text('{"eos_token_id": 1}\n')
    return folder


def _resume_damaged(campaign: Campaign, run_dir: Path, name: str, is_all: bool, fields: dict) -> None:
    """Resume a run whose newest checkpoint is damaged: it falls back, or refuses if no other one is left."""
    outcome = campaign.run(run_dir, "TP2", steps=6, **fields)
    campaign.counts["resumes"] += 1
    wanted = [78, 78] if is_all else [0, 0]
    campaign.expect(
        outcome.codes == wanted or outcome.codes == [0, 0], f"{name}: statuses {outcome.codes}: {outcome.text[-400:]}"
    )
    campaign.expect("Traceback" not in outcome.text, f"{name}: traceback")
    campaign.expect(any(text in outcome.text for text in ("is damaged", "no undamaged")), f"{name}: not reported")
    campaign.expect("resumed from" not in outcome.text or "step-00000004\n" not in outcome.text, f"{name}: was used")


def fail_disks(campaign: Campaign, count: int) -> None:
    """Let every call of a save fail with every error: one line, the earlier checkpoint intact, and the run resumes.

    A call that removes an old checkpoint does not end the run: the new one is complete.
    """
    base = campaign.fresh("base")
    campaign.run(base, "one rank", steps=2)
    for background in (False, True):
        fields = {"checkpoint.async_save": background}
        counted = campaign.run(_copy(base, campaign.fresh("failing")), "one rank", Fault(COUNT, 0), steps=3, **fields)
        cases = [(at, number) for at in range(1, counted.calls + 1) for number in DISK_ERRORS]
        campaign.expect(counted.calls > 15, f"only {counted.calls} calls of a save were seen")
        if count:
            cases = campaign.rng.sample(cases, min(count // 2, len(cases)))
        for at, number in cases:
            _fail_one(campaign, base, at, number, fields)
        _fail_one_rank(campaign, fields)


def _fail_one_rank(campaign: Campaign, fields: dict) -> None:
    """Let the disk of rank 1 alone be full: all ranks end with the same error within seconds."""
    outcome = campaign.run(campaign.fresh("failing"), "DP2", Fault(FAIL, 1, errno.ENOSPC, rank=1), steps=30, **fields)
    campaign.counts["failures of one rank"] += 1
    campaign.expect(
        outcome.codes == [78, 78] and outcome.seconds < 30, f"one rank: {outcome.codes}, {outcome.seconds:.0f} s"
    )
    campaign.expect("rank 1: " in outcome.text and "Traceback" not in outcome.text, f"one rank: {outcome.text[-400:]}")


def _copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def _fail_one(campaign: Campaign, base: Path, at: int, number: int, fields: dict) -> None:
    run_dir = _copy(base, campaign.fresh("failing"))
    outcome = campaign.run(run_dir, "one rank", Fault(FAIL, at, number), steps=3, **fields)
    campaign.counts["failures"] += 1
    campaign.counts[errno.errorcode[number]] += 1
    name = f"{errno.errorcode[number]} at call {at}{', background' if fields['checkpoint.async_save'] else ''}"
    newest = tiny.newest(run_dir)
    if "cannot be removed: " in outcome.text:
        campaign.counts["failed removals"] += 1
        ended = outcome.codes == [0] and newest is not None and newest.name == "step-00000003"
        campaign.expect(ended, f"{name}: status {outcome.codes}, newest {newest}: {outcome.text[-400:]}")
    else:
        campaign.expect(outcome.codes == [78], f"{name}: status {outcome.codes}: {outcome.text[-400:]}")
        lines = [line for line in outcome.text.splitlines() if line.startswith("pretrain: ")]
        campaign.expect(len(lines) == 1, f"{name}: {outcome.text[-600:]}")
    campaign.expect("Traceback" not in outcome.text, f"{name}: {outcome.text[-600:]}")
    campaign.expect(newest is not None and not tiny.damage_of(newest), f"{name}: no good checkpoint is left")
    if campaign.counts["failures"] % 5 == 0:
        again = campaign.run(run_dir, "one rank", steps=4, **fields)
        campaign.counts["resumes"] += 1
        campaign.expect(again.codes == [0], f"{name}: cannot be resumed: {again.text[-300:]}")
        campaign.expect(not tiny.remains(run_dir), f"{name}: left {tiny.remains(run_dir)}")


def main() -> int:
    """Run the campaign and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damages", type=int, default=400)
    parser.add_argument("--resumes", type=int, default=20, help="damaged checkpoints that a run resumes from")
    parser.add_argument("--failures", type=int, default=0, help="failing calls; 0: every call with every error")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=Path, help="write the counts as JSON")
    a = parser.parse_args()
    shim_folder = Path(tempfile.gettempdir())
    forked.with_shim(shim_folder)
    forked.preload()
    parts = {
        "kills inside saves": lambda c: kill_saves(c, a.kills),
        "damaged files": lambda c: damage_files(c, a.damages, a.resumes),
        "failing disks": lambda c: fail_disks(c, a.failures),
    }
    rows, failed = [], False
    for part, work in parts.items():
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            campaign, begin = Campaign(Path(folder), a.seed), time.monotonic()
            work(campaign)
        seconds = round(time.monotonic() - begin)
        counts = ", ".join(f"{number} {name}" for name, number in campaign.counts.items())
        print(f"{'FAILED' if campaign.problems else 'passed'} {part}: {counts}, {seconds} s", flush=True)
        for problem in campaign.problems[:20]:
            print(f"  {problem}", flush=True)
        failed |= bool(campaign.problems)
        rows += [
            {"case": part, "metric": name, "unit": "cases", "ours": n, "goal": None}
            for name, n in campaign.counts.items()
        ]
        rows.append({"case": part, "metric": "problems", "unit": "cases", "ours": len(campaign.problems), "goal": 0})
        rows.append({"case": part, "metric": "time", "unit": "s", "ours": seconds, "goal": None})
    if a.rows:
        a.rows.write_text(json.dumps(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
