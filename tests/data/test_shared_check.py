"""The token check in pieces: shared over processes, resumed where it was, sampled where there is too much."""

import json
import os
from collections.abc import Iterator

import numpy as np
import pytest

from megatron_hybrid.config.data import DataConfig, SourceConfig
from megatron_hybrid.data import validate, verdicts
from megatron_hybrid.data.build import build_train_and_validation
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.sources import open_source
from megatron_hybrid.data.validate import check_sources, choose_mode, sample_windows
from megatron_hybrid.data.verdicts import VerdictCache
from tests.data.files import write_indexed, write_raw


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 1,000 tokens of two bytes, samples of 10 in every 100."""
    for name, value in dict(
        PIECE_BYTES=2000, SAMPLED_PIECE_BYTES=2000, SAMPLE_EVERY_BYTES=200, SAMPLE_BYTES=20
    ).items():
        monkeypatch.setattr(validate, name, value)


@pytest.fixture
def scans(monkeypatch):
    """(file, start, stop) of what was read."""
    seen, real = [], validate.scan

    def scan(shard, vocab_size, start=0, stop=None):
        seen.append((shard.path.rsplit("/")[-1], start, stop))
        return real(shard, vocab_size, start, stop)

    monkeypatch.setattr(validate, "scan", scan)
    return seen


class Taking:
    """A team whose other processes take all pieces but those given."""

    def __init__(self, *mine: int):
        self.mine, self.asked = mine, []

    def claim(self, work: str, count: int) -> Iterator[int]:
        self.asked.append((work, count))
        return iter(self.mine)


def source(path, tokens=None, vocab_size=1000):
    if tokens is not None:
        write_raw(path, tokens)
    return open_source(SourceConfig(path=str(path)), vocab_size)


def test_two_processes_share_a_file_and_a_third_run_reads_nothing(tmp_path, small_pieces, scans):
    data, run = source(tmp_path / "a.npy", np.arange(2500) % 900), tmp_path / "run"
    one, other = Taking(0, 2), Taking(1)
    for rank, team in enumerate((one, other)):
        check_sources([data], 1000, "full", VerdictCache(run, rank), team)
    assert one.asked == other.asked == [(one.asked[0][0], 3)], "the same work has the same name"
    assert sorted(scans) == [("a.npy", 0, 1000), ("a.npy", 1000, 2000), ("a.npy", 2000, 2500)]
    assert sorted(file.name for file in run.iterdir()) == ["validated_data.1.json", "validated_data.json"]
    VerdictCache(run).collect()
    assert [file.name for file in run.iterdir()] == ["validated_data.json"]
    check_sources([data], 1000, "full", VerdictCache(run))
    assert len(scans) == 3
    (verdict,) = json.loads((run / "validated_data.json").read_text()).values()
    assert verdict["max_token"] == 899 and "pieces" not in verdict


def test_a_killed_check_continues_inside_a_file(tmp_path, small_pieces, scans, monkeypatch):
    data, run = source(tmp_path / "a.npy", np.arange(10_000) % 900), tmp_path / "run"
    monkeypatch.setattr(verdicts, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(validate, "_THREADS", 1)
    real = validate.scan

    def killed(shard, vocab_size, start, stop):
        if start == 6000:
            raise KeyboardInterrupt
        return real(shard, vocab_size, start, stop)

    monkeypatch.setattr(validate, "scan", killed)
    with pytest.raises(KeyboardInterrupt):
        check_sources([data], 1000, "full", VerdictCache(run))
    scans.clear()
    monkeypatch.setattr(validate, "scan", real)
    check_sources([data], 1000, "full", VerdictCache(run))
    starts = {start for _, start, _ in scans}
    assert 6000 in starts and not {0, 1000, 2000, 3000} & starts


def test_samples_hold_both_ends_of_every_shard_and_are_the_same_every_time(tmp_path, small_pieces):
    shard = source(tmp_path / "a.npy", np.zeros(5003, int)).shards[0]
    windows = [
        window
        for piece in validate.cut(shard, "sample", 1000)
        for window in sample_windows(shard, piece.start, piece.stop)
    ]
    assert windows == [
        window
        for piece in validate.cut(shard, "sample", 1000)
        for window in sample_windows(shard, piece.start, piece.stop)
    ]
    assert windows[0] == (0, 10) and windows[-1][1] == 5003
    inner = [start for start, _ in windows[1:-1]]
    assert [start // 100 for start in inner] == list(range(50)), "one in every hundred tokens"
    assert all(start % 2 == 0 for start in inner)


@pytest.mark.parametrize("place", [0, 5002])
def test_a_sample_finds_a_bad_token_at_an_end(tmp_path, small_pieces, place):
    tokens = np.zeros(5003, int)
    tokens[place] = 1000
    with pytest.raises(DataError, match=f"byte {2 * place}: token 1000"):
        check_sources([source(tmp_path / "a.npy", tokens)], 1000, "sample")


def test_a_complete_verdict_covers_a_sample_but_not_the_reverse(tmp_path, small_pieces, scans):
    data, run = source(tmp_path / "a.npy", np.zeros(900, int)), tmp_path / "run"
    check_sources([data], 1000, "sample", VerdictCache(run))
    sampled = len(scans)
    check_sources([data], 1000, "sample", VerdictCache(run))
    assert len(scans) == sampled
    check_sources([data], 1000, "full", VerdictCache(run))
    assert scans[sampled:] == [("a.npy", 0, 900)]
    check_sources([data], 1000, "sample", VerdictCache(run))
    assert len(scans) == sampled + 1


def test_auto_is_full_below_the_limit(tmp_path, monkeypatch):
    data = source(tmp_path / "a.npy", np.zeros(900, int))
    assert choose_mode("auto", [data]) == "full" and choose_mode("none", [data]) is None
    monkeypatch.setattr(validate, "FULL_BELOW_BYTES", 1800)
    assert choose_mode("auto", [data]) == "sample" and choose_mode("full", [data]) == "full"


def test_none_reads_nothing_and_training_still_names_a_bad_token(tmp_path, scans):
    tokens = np.zeros(900, int)
    tokens[500] = 300
    config = DataConfig(train=({"path": write_raw(tmp_path / "a.npy", tokens)},), sequence_length=16, check="none")
    train, _ = build_train_and_validation(config, 257)
    assert scans == []
    with pytest.raises(DataError, match=r"a.npy: byte 1000: token 300 \(number 500, uint16\)"):
        for i in range(train.datasets[0].samples_per_epoch):
            train.sample(i)


def test_copies_on_two_nodes_are_checked_by_each(tmp_path):
    """Same path, size and time, but another file: each node sees its own disk."""
    path, names = write_raw(tmp_path / "a.npy", np.zeros(10, int)), []
    for _ in range(2):
        team = Taking()
        check_sources([source(path)], 1000, "full", None, team)
        names.append(team.asked[0][0])
        copy = write_raw(tmp_path / "copy.npy", np.zeros(10, int))
        stat = os.stat(path)
        os.replace(copy, path)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert names[0] != names[1]


def test_a_file_cut_short_while_it_is_read_is_named(tmp_path):
    data = source(tmp_path / "a.npy", np.zeros(900, int))
    data.read(0, 900)
    with open(tmp_path / "a.npy", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(DataError, match="a.npy: ends before byte 1800: it was cut short"):
        data.read(0, 900)


def test_more_shards_than_files_may_be_open(tmp_path):
    for i in range(300):
        write_raw(tmp_path / f"{i:03}.npy", [i, i])
    data = open_source(SourceConfig(path=f"{tmp_path}/*.npy"), 1000)
    assert data.read(0, 600).tolist() == [i // 2 for i in range(600)]
    assert len(data._open) == 256 and data.read(0, 2).tolist() == [0, 0]


def test_a_replaced_bin_is_noticed(tmp_path):
    prefix = write_indexed(tmp_path / "a", [[1, 2], [3, 4]])
    summary = dict(documents=2, tokens=4, max_token=4, dtype="uint16", tokenizer="byte", vocab_size=257)
    (tmp_path / "a.json").write_text(json.dumps(summary | dict(eos_token_id=256, append_eos=False)))
    check_sources([open_source(SourceConfig(path=prefix), 257)], 257, "full")
    write_raw(tmp_path / "a.bin", [1, 2, 3, 200])
    with pytest.raises(
        DataError, match=r"a.bin: token 200 is larger than all tokens .* at most 4: the .bin has been replaced"
    ):
        check_sources([open_source(SourceConfig(path=prefix), 257)], 257, "full")
    write_indexed(tmp_path / "a", [[1, 2, 3, 4, 5]])
    with pytest.raises(DataError, match=r"a.json: tokens is 4, but .*a.idx has 5"):
        open_source(SourceConfig(path=prefix), 257)


def test_the_tool_checks_everything_and_training_finds_its_verdicts(tmp_path, monkeypatch, capsys, scans):
    from tools import check_data

    monkeypatch.setattr(validate, "FULL_BELOW_BYTES", 0)
    tokens = write_raw(tmp_path / "a.npy", np.zeros(900, int))
    config = tmp_path / "run.yaml"
    model = {"base_preset": "olmo_hybrid_tiny", "layer_pattern": "GA"}
    sections = {"run_dir": str(tmp_path / "run"), "model": model, "train": {"steps": 1, "global_batch_size": 1}}
    config.write_text(json.dumps(sections | {"data": {"train": [{"path": tokens}], "sequence_length": 16}}))
    monkeypatch.setattr("sys.argv", ["check_data.py", str(config)])
    check_data.main()
    assert scans == [("a.npy", 0, 900)] and "a.npy: 900 tokens" in capsys.readouterr().out
    build_train_and_validation(DataConfig(train=({"path": tokens},), sequence_length=16), 257, tmp_path / "run")
    assert len(scans) == 1
    write_raw(tmp_path / "a.npy", np.full(900, 300))
    with pytest.raises(SystemExit) as end:
        check_data.main()
    assert end.value.code == 78 and "token 300" in capsys.readouterr().err


def test_the_tool_prepares_documents(tmp_path, monkeypatch, capsys):
    """With data.documents pack the tool once ended in a traceback."""
    from tools import check_data

    documents = [[1] * 5, [2] * 12, [3] * 20, [4] * 3]
    write_indexed(tmp_path / "a", documents)
    config, model = tmp_path / "run.yaml", {"base_preset": "olmo_hybrid_tiny", "layer_pattern": "GA"}
    sections = {"run_dir": str(tmp_path / "run"), "model": model, "train": {"steps": 1, "global_batch_size": 1}}
    data = {"train": [{"path": str(tmp_path / "a")}], "sequence_length": 16, "documents": "pack"}
    config.write_text(json.dumps(sections | {"data": data}))
    monkeypatch.setattr("sys.argv", ["check_data.py", str(config)])
    check_data.main()
    assert "4 documents" in capsys.readouterr().out
    assert list((tmp_path / "run" / "documents").glob("packing-*"))
