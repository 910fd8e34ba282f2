"""Verification on resume: changed files are found, by one process and by the ranks of a run together."""

import json
import random
import shutil

import pytest
import torch

from megatron_hybrid.arch.tensor_slice import TensorSlice
from megatron_hybrid.checkpoint.format import INDEX, CheckpointError, Index
from megatron_hybrid.checkpoint.index_file import read_index
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.checkpoint.removal import REPLACED, SAVING, remove_checkpoint, remove_remains, set_damaged_aside
from megatron_hybrid.checkpoint.verification import file_sha256, share_of_files
from megatron_hybrid.checkpoint.writer import SlicedTensor, finish, write_rank
from testing import checkpoints
from testing.checkpoints import edit_index, make_earlier_version


def save(root, step: int = 7, ranks: int = 2):
    folder, target = root / f"{SAVING}step-{step:08d}", root / f"step-{step:08d}"
    (folder / "original").mkdir(parents=True)
    (folder / "original/tokenizer.json").write_text("{}")
    kept = {"original/tokenizer.json": {"bytes": 2, "sha256": file_sha256(folder / "original/tokenizer.json")}}
    for rank in range(ranks):
        part = TensorSlice((rank * 4, 0), (4, 5))
        tensor = SlicedTensor("w", (4 * ranks, 5), part, torch.full((4, 5), float(rank + step)))
        write_rank(folder, rank, [tensor], {"rng": torch.arange(3)})
    finish(folder, target, Index({"m": 1}, {}, {"step": step}, other_files=kept), ranks, timeout_s=1)
    return target


def flip(path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("name", [INDEX, "rank-00000.safetensors", "rank-00001.safetensors", "original/tokenizer.json"])
def test_a_flipped_bit_anywhere_is_found(name, tmp_path):
    folder, rng = save(tmp_path), random.Random(0)
    good = (folder / name).read_bytes()
    for at in [*range(min(len(good), 60)), *rng.sample(range(len(good)), min(len(good), 60)), len(good) - 1]:
        flip(folder / name, at, rng.randrange(8))
        with pytest.raises(CheckpointError):
            CheckpointReader(folder)
        (folder / name).write_bytes(good)
    CheckpointReader(folder).close()


def test_sizes_alone_are_compared_on_request(tmp_path):
    folder = save(tmp_path)
    path = folder / "rank-00001.safetensors"
    flip(path, path.stat().st_size - 1, 3)
    CheckpointReader(folder, verify="sizes").close()
    with pytest.raises(CheckpointError, match=r"rank-00001.safetensors: its SHA-256 is .* the file has changed"):
        CheckpointReader(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i["tensors"]["w"]["shards"][1].update(offset=[0, 0]), "two slices that overlap, at row 0"),
        (lambda i: i["tensors"]["w"]["shards"].pop(), "holds 20 values of 40"),
        (lambda i: i["files"].pop("rank-00001.safetensors"), "w is in rank-00001.safetensors, which it does not list"),
        (lambda i: i.update(more=1), "unknown member 'more'"),
        (lambda i: i["other_files"].update({"../x": {"bytes": 1, "sha256": None}}), "is not the name of a file"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(change, message, tmp_path):
    folder = save(tmp_path)
    edit_index(folder, change)
    with pytest.raises(CheckpointError, match=message):
        read_index(folder)


def test_a_checksum_is_required_of_this_version_and_not_of_earlier_ones(tmp_path, capsys):
    folder = save(tmp_path)
    content = json.loads((folder / INDEX).read_text())
    del content["sha256"]
    (folder / INDEX).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="should end with its checksum"):
        read_index(folder)
    shutil.rmtree(folder)
    make_earlier_version(folder := save(tmp_path))
    CheckpointReader(folder).close()
    assert "its index.json has no checksum, so that changes to it go unnoticed" in capsys.readouterr().err


def test_entries_that_the_file_does_not_hold_are_refused(tmp_path):
    folder = save(tmp_path)
    edit_index(folder, lambda i: i["tensors"]["w"]["shards"][0].update(entry="no"))
    with (
        CheckpointReader(folder) as reader,
        pytest.raises(CheckpointError, match="'no' is nothing; the index says F32"),
    ):
        reader.read("w")


def test_a_file_that_becomes_shorter_while_it_is_read_is_named(tmp_path):
    folder = save(tmp_path)
    with CheckpointReader(folder) as reader:
        assert torch.equal(reader.read("w")[4:], torch.full((4, 5), 8.0))
        path = folder / "rank-00001.safetensors"
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(CheckpointError, match="rank-00001.safetensors: ends at byte"):
            reader.read("w")


def test_ranks_share_all_files():
    files = {f"f{n}": {"bytes": n * n % 17} for n in range(50)}
    shares = [share_of_files(files, rank, 7) for rank in range(7)]
    assert sorted(name for share in shares for name in share) == sorted(files)
    loads = [sum(files[name]["bytes"] for name in share) for share in shares]
    assert max(loads) - min(loads) <= 16


def test_ranks_agree_on_damage(ranks, tmp_path):
    folder = save(tmp_path)
    assert ranks.run(checkpoints.damage_seen, 2, folder=str(folder)) == [None, None]
    path = folder / "rank-00001.safetensors"
    flip(path, path.stat().st_size - 1, 0)
    found = ranks.run(checkpoints.damage_seen, 2, folder=str(folder))
    assert found[0] == found[1] and "the file has changed" in found[0]
    (folder / INDEX).write_text("{")
    found = ranks.run(checkpoints.damage_seen, 2, folder=str(folder))
    assert found[0] == found[1] and "not readable JSON" in found[0]


@pytest.mark.parametrize(("name", "rank"), [(INDEX, 0), ("rank-00000.safetensors", 0), ("rank-00001.safetensors", 1)])
def test_what_a_rank_cannot_read_is_an_error_and_no_damage(ranks, tmp_path, name, rank):
    folder = save(tmp_path)
    found = ranks.run(checkpoints.damage_seen, 2, folder=str(folder), patience_s=0.5, unreadable=name)
    assert found[0] == found[1] and found[0].startswith("unreadable: ") and f"{name}: cannot be read" in found[0]
    assert "Stale file handle; mount the network file system again. If the file is lost, remove" in found[0]
    assert name == INDEX or f"rank {rank}: " in found[0]
    assert ranks.run(checkpoints.damage_seen, 2, folder=str(folder), unreadable=name, recovers=True) == [None, None]


def test_a_git_lfs_pointer_is_an_error_on_all_ranks(ranks, tmp_path):
    folder = save(tmp_path)
    (folder / INDEX).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    found = ranks.run(checkpoints.damage_seen, 2, folder=str(folder))
    assert found[0] == found[1] and "git lfs pull" in found[0]


def test_ranks_that_see_other_files_refuse(ranks, tmp_path):
    save(tmp_path / "0"), save(tmp_path / "1", ranks=3)
    found = ranks.run(checkpoints.damage_seen, 2, folder=str(tmp_path / "{rank}/step-00000007"), patience_s=0.5)
    assert (
        found[0] == found[1] and found[0].startswith("refused: rank 1: ") and "another file than on rank 0" in found[0]
    )


def test_the_error_of_one_rank_is_raised_on_all(ranks, tmp_path):
    for background in (False, True):
        found = ranks.run(checkpoints.save_that_fails, 2, folder=str(tmp_path), background=background)
        assert found[0] == found[1] and "rank 1: " in found[0] and "No space left on device" in found[0]
        assert "bytes are free" in found[0] and not list(tmp_path.glob("*step*"))


def test_links_are_removed_and_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    root = tmp_path / "checkpoints"
    root.mkdir()
    (root / ".saving-step-00000005").symlink_to(outside)
    (root / "step-00000001").symlink_to(outside)
    remove_checkpoint(root / "step-00000001")
    assert remove_remains(root) == ([".saving-step-00000005"], {})
    assert not list(root.iterdir()) and (outside / "precious").exists()


def test_only_our_own_remains_are_removed(tmp_path):
    for name in (".saving-step-notes", ".deleting-step-1", "saving-step-00000005", ".saving-step-00000005.tar"):
        (tmp_path / name).mkdir()
    assert remove_remains(tmp_path) == ([], {}) and len(list(tmp_path.iterdir())) == 4


def test_a_checkpoint_that_was_being_replaced_is_restored(tmp_path):
    folder = save(tmp_path)
    folder.rename(tmp_path / f"{REPLACED}{folder.name}")
    assert remove_remains(tmp_path) == ([], {})
    CheckpointReader(folder).close()


def test_damaged_checkpoints_never_replace_each_other(tmp_path):
    names = [set_damaged_aside(save(tmp_path)).name for _ in range(3)]
    assert names == [f"step-00000007.damaged{suffix}" for suffix in ("", "-2", "-3")]
