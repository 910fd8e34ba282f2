"""Checkpoint folders: written completely or not at all, read back slice by slice, refused when damaged."""

import errno
import os
import random
import weakref

import pytest
import torch

from megatron_hybrid.arch.tensor_slice import TensorSlice
from megatron_hybrid.checkpoint import writer
from megatron_hybrid.checkpoint.folders import complete_checkpoints, find_checkpoint
from megatron_hybrid.checkpoint.format import INDEX, CheckpointError, Index, slices_of_range
from megatron_hybrid.checkpoint.index_file import read_index
from megatron_hybrid.checkpoint.manager import CheckpointManager
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.checkpoint.removal import remove_checkpoint, remove_remains
from megatron_hybrid.checkpoint.verification import file_sha256
from megatron_hybrid.checkpoint.writer import AsyncWrites, SlicedTensor, finish, write_rank
from megatron_hybrid.config.checkpoint import CheckpointConfig
from testing.checkpoints import edit_index

STATE = {"step": 7}


def split(tensor: torch.Tensor, parts: int, name: str, rng: random.Random) -> list[SlicedTensor]:
    """Return the tensor in row blocks, some of which are flattened and split again at random."""
    shards, cuts = [], sorted(rng.sample(range(1, tensor.shape[0]), parts - 1))
    for start, stop in zip([0, *cuts], [*cuts, tensor.shape[0]], strict=True):
        block = tensor[start:stop]
        offset, shape = (start, *(0,) * (tensor.dim() - 1)), tuple(block.shape)
        if rng.random() < 0.5 or block.numel() < 3:
            shards.append(SlicedTensor(name, tuple(tensor.shape), TensorSlice(offset, shape), block))
        else:
            ends = [0, *sorted(rng.sample(range(1, block.numel()), 2)), block.numel()]
            shards += [
                SlicedTensor(name, tuple(tensor.shape), TensorSlice(offset, shape), block.flatten()[lo:hi], (lo, hi))
                for lo, hi in zip(ends, ends[1:], strict=False)
            ]
    return shards


def write(root, step: int, shards_by_rank: list[list[SlicedTensor]]):
    folder, target = root / f".saving-step-{step:08d}", root / f"step-{step:08d}"
    folder.mkdir(parents=True)
    for rank, shards in enumerate(shards_by_rank):
        write_rank(folder, rank, shards, {"rng": torch.arange(3) + rank})
    finish(folder, target, Index({"m": 1}, {}, STATE), len(shards_by_rank), timeout_s=1)
    return target


@pytest.fixture
def checkpoint(tmp_path):
    value = torch.arange(60.0).view(12, 5)
    return write(tmp_path, 7, [[SlicedTensor("w", (12, 5), TensorSlice((0, 0), (12, 5)), value)]])


@pytest.mark.parametrize("seed", range(20))
def test_any_slice_of_a_tensor_stored_in_any_slices(seed, tmp_path):
    rng = random.Random(seed)
    tensors = {"a": torch.randn(13, 7), "b": torch.randn(31), "c": torch.randn(8, 4).bfloat16()}
    shards = [s for n, t in tensors.items() for s in split(t, rng.randint(2, 5), n, rng)]
    rng.shuffle(shards)
    folder = write(tmp_path, seed, [shards[::2], shards[1::2]])
    with CheckpointReader(folder) as reader:
        for name, tensor in tensors.items():
            assert torch.equal(reader.read(name), tensor)
            for _ in range(10):
                at = tuple(rng.randrange(n) for n in tensor.shape)
                size = tuple(rng.randint(1, n - o) for n, o in zip(tensor.shape, at, strict=True))
                expected = tensor[tuple(slice(o, o + k) for o, k in zip(at, size, strict=True))]
                found = reader.read(name, TensorSlice(at, size))
                assert torch.equal(found, expected) and found.dtype == tensor.dtype
        assert reader.index.state == STATE
        assert reader.local_tensors(1)["rng"].tolist() == [1, 2, 3]


def test_a_large_part_takes_several_files_and_memory_for_one(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "FILE_BYTES", 1000)
    alive: list[weakref.ref] = []

    def shards():
        for row in range(20):
            data = torch.full((1, 100), float(row))  # 400 bytes: three make a file
            assert sum(reference() is not None for reference in alive) <= 4  # and the last, in a variable
            alive.append(weakref.ref(data))
            yield SlicedTensor("w", (20, 100), TensorSlice((row, 0), (1, 100)), data)

    folder = write(tmp_path, 5, [shards(), [SlicedTensor("x", (2,), TensorSlice((0,), (2,)), torch.ones(2))]])
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    more = [f"rank-00000-{n:03d}.safetensors" for n in range(1, 7)]
    assert names == sorted(["rank-00000.safetensors", *more, "rank-00001.safetensors"])
    with CheckpointReader(folder) as reader:
        assert torch.equal(reader.read("w"), torch.arange(20.0)[:, None].expand(20, 100))
        assert torch.equal(
            reader.read("w", TensorSlice((2, 7), (3, 2))), torch.tensor([[2.0, 2.0], [3.0, 3.0], [4.0, 4.0]])
        )
        assert reader.local_tensors(0)["rng"].tolist() == [0, 1, 2]
        assert sorted(reader.index.files) == names
        assert all(facts["sha256"] == file_sha256(folder / name) for name, facts in reader.index.files.items())


def test_a_part_that_is_missing_is_not_committed(tmp_path):
    half = SlicedTensor("w", (12, 5), TensorSlice((0, 0), (6, 5)), torch.zeros(6, 5))
    with pytest.raises(CheckpointError, match=r"w holds 30 values of 60"):
        write(tmp_path, 3, [[half]])
    assert complete_checkpoints(tmp_path) == []


def test_a_rank_that_never_writes_is_named(tmp_path):
    folder = tmp_path / ".saving"
    folder.mkdir()
    write_rank(folder, 0, [], {"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="rank-00001 of 2 ranks cannot be seen there"):
        finish(folder, tmp_path / "step-00000001", Index({}, {}, {}), 2, timeout_s=0.1)


DAMAGES = {
    "no index": (lambda p: (p / INDEX).unlink(), "has no index.json"),
    "torn index": (lambda p: (p / INDEX).write_text((p / INDEX).read_text()[:100]), "damaged"),
    "another format": (lambda p: edit_index(p, lambda d: d.update(format="x/9")), "this version reads"),
    "file gone": (lambda p: (p / "rank-00000.safetensors").unlink(), "no file"),
    "file short": (lambda p: (p / "rank-00000.safetensors").write_bytes(b"12345"), "5 bytes"),
    "path outside": (
        lambda p: edit_index(p, lambda d: d["tensors"]["w"]["shards"][0].update(file="../x.safetensors")),
        "not the name of a safetensors file",
    ),
    "shard outside": (
        lambda p: edit_index(p, lambda d: d["tensors"]["w"]["shards"][0].update(offset=[1, 0])),
        "outside the tensor",
    ),
    "not an object": (lambda p: (p / INDEX).write_text("[]"), "damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(damage, checkpoint):
    work, message = DAMAGES[damage]
    work(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        read_index(checkpoint)


def test_reading_what_is_not_there(checkpoint):
    with CheckpointReader(checkpoint) as reader:
        with pytest.raises(CheckpointError, match="no tensor x"):
            reader.read("x")
        with pytest.raises(CheckpointError, match="nothing is stored at"):
            reader.read("w", TensorSlice((11, 0), (2, 5)))


def test_finding_where_to_start(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    assert complete_checkpoints(root) == []
    one = [[SlicedTensor("w", (2,), TensorSlice((0,), (2,)), torch.zeros(2))]]
    first, second = write(root, 5, one), write(root, 10, one)
    (root / ".saving-step-00000015").mkdir()
    (root / "step-00000020").mkdir()  # no index: not complete
    assert complete_checkpoints(root) == [first, second]
    assert find_checkpoint(str(first), "checkpoint.resume") == first
    assert find_checkpoint(str(tmp_path / "run"), "checkpoint.resume") == second
    with pytest.raises(CheckpointError, match="checkpoint.init_from: .*no complete checkpoint there"):
        find_checkpoint(str(tmp_path / "elsewhere"), "checkpoint.init_from")


def test_what_is_kept(tmp_path):
    one = [[SlicedTensor("w", (2,), TensorSlice((0,), (2,)), torch.zeros(2))]]
    for step in range(10, 80, 10):
        write(tmp_path, step, one)
    manager = CheckpointManager.__new__(CheckpointManager)
    manager.root, manager.config = tmp_path, CheckpointConfig(interval=10, keep_last=2, keep_every=30)
    manager.own = complete_checkpoints(tmp_path)
    manager._remove_old()
    assert [p.name[-2:] for p in complete_checkpoints(tmp_path)] == ["30", "60", "70"]


def test_checkpoints_of_another_run_are_neither_counted_nor_removed(tmp_path):
    one = [[SlicedTensor("w", (2,), TensorSlice((0,), (2,)), torch.zeros(2))]]
    for step in range(10, 80, 10):
        write(tmp_path, step, one)
    manager = CheckpointManager.__new__(CheckpointManager)
    manager.root, manager.config = tmp_path, CheckpointConfig(interval=10, keep_last=1)
    manager.own = complete_checkpoints(tmp_path)[1:3]
    manager._remove_old()
    assert [p.name[-2:] for p in complete_checkpoints(tmp_path)] == ["10", "30", "40", "50", "60", "70"]


def test_a_removal_that_fails_ends_nothing_and_is_tried_again(tmp_path, monkeypatch, capsys):
    one = [[SlicedTensor("w", (2,), TensorSlice((0,), (2,)), torch.zeros(2))]]
    for step in (10, 20, 30):
        write(tmp_path, step, one)
    manager = CheckpointManager.__new__(CheckpointManager)
    manager.root, manager.config = tmp_path, CheckpointConfig(interval=10, keep_last=1)
    manager.own, manager._not_removed = complete_checkpoints(tmp_path), set()
    rmdir = os.rmdir

    def in_use(path, **options):
        """As on NFS while another process has a file in the folder open."""
        if str(path).endswith("step-00000010"):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        rmdir(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", in_use)
        for _ in range(2):
            manager._remove_old()
        assert remove_remains(tmp_path) == ([], {".deleting-step-00000010": "Directory not empty"})
    assert capsys.readouterr().out.count("step-00000010 cannot be removed: Directory not empty; the run continues") == 1
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000030"]
    manager._remove_old()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000030"] == [path.name for path in manager.own]


def test_a_removal_that_is_killed_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    folder = write(tmp_path, 10, [[SlicedTensor("w", (2,), TensorSlice((0,), (2,)), torch.zeros(2))]])

    def killed(path, **_):
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("megatron_hybrid.checkpoint.removal.shutil.rmtree", killed)
        remove_checkpoint(folder)
    assert not complete_checkpoints(tmp_path)
    (tmp_path / ".saving-step-00000020").mkdir()
    assert remove_remains(tmp_path) == ([".deleting-step-00000010", ".saving-step-00000020"], {})
    assert not list(tmp_path.iterdir())


def test_an_error_in_the_background_reaches_the_training_loop():
    writes = AsyncWrites()

    def fail():
        raise OSError(28, "No space left on device")

    writes.start(fail)
    with pytest.raises(OSError, match="No space left"):
        writes.wait()
    writes.wait()  # raised once


@pytest.mark.parametrize("shape", [(40,), (40, 1), (14, 3), (6, 8)])
def test_slices_of_range_tile_it_in_order(shape):
    flat = torch.arange(torch.Size(shape).numel())
    for start in range(20):
        for stop in range(start, 30):
            elements = [flat.view(shape)[part.index].flatten() for part in slices_of_range(start, stop, shape)]
            assert torch.equal(torch.cat([flat[:0], *elements]), flat[start:stop])
            assert len(elements) <= 3
