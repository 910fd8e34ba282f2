"""Raw shards that are not of the type they are read as are refused, and the right type is named."""

import numpy as np
import pytest

from megatron_hybrid.config.data import SourceConfig
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.raw_tokens import contradiction
from megatron_hybrid.data.sources import open_source

TOKENS = np.random.default_rng(0).integers(1, 90, 4000)

WRONG = {
    "uint32 as uint16": ("<u4", None, 97, "every second token is 0.*little-endian uint32.*dtype to uint32"),
    "uint32 of a large vocabulary": ("<u4", "uint16", 100_352, "every second token is at most 1.*uint32"),
    "big-endian": (">u4", None, 97, "big-endian uint32. Convert"),
    "int64 as uint16": ("<i8", None, 97, "64-bit integers. Convert the file"),
    "int64 as uint32": ("<i8", "uint32", 97, "64-bit integers. Convert the file"),
}


def open_raw(path, dtype, vocab_size):
    return open_source(SourceConfig(path=str(path), dtype=dtype), vocab_size)


@pytest.mark.parametrize("case", WRONG)
def test_another_width_is_named(tmp_path, case):
    stored, read_as, vocab_size, message = WRONG[case]
    scale = 1000 if vocab_size > 1 << 16 else 1
    (TOKENS * scale).astype(stored).tofile(tmp_path / "a.npy")
    with pytest.raises(DataError, match=f"a.npy: byte 0: .*{message}"):
        open_raw(tmp_path / "a.npy", read_as, vocab_size)


@pytest.mark.parametrize(("stored", "read_as", "right"), [("<u2", "uint32", "uint16"), ("u1", "uint16", "uint8")])
def test_tokens_beyond_the_vocabulary_hint_at_the_type_that_fits(tmp_path, stored, read_as, right):
    TOKENS.astype(stored).tofile(tmp_path / "a.npy")
    source = open_raw(tmp_path / "a.npy", read_as, 97)
    with pytest.raises(DataError, match=rf"a.npy: byte 0: token \d+ .*Read as {right}, these bytes are inside it"):
        source.read(0, 100)


def test_one_token_beyond_the_vocabulary_is_no_hint(tmp_path):
    tokens = TOKENS.astype("<u2")
    tokens[1001] = 300
    tokens.tofile(tmp_path / "a.npy")
    with pytest.raises(DataError, match=r"byte 2002: token 300 .* or not of this type$"):
        open_raw(tmp_path / "a.npy", None, 97).read(0, 4000)


def test_text_and_lfs_pointers_are_no_tokens(tmp_path):
    (tmp_path / "a.npy").write_text("All happy families are alike. " * 40)
    with pytest.raises(DataError, match="holds text, not tokens"):
        open_raw(tmp_path / "a.npy", None, 65_536)
    (tmp_path / "a.npy").write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 42000\n")
    with pytest.raises(DataError, match="Git LFS pointer"):
        open_raw(tmp_path / "a.npy", None, 65_536)


@pytest.mark.parametrize(
    "tokens",
    [
        np.zeros(5000, "<u2"),  # padding
        np.ones(5000, "<u2"),
        TOKENS.astype("<u2"),
        np.where(np.arange(5000) % 3 == 1, 0, 7).astype("<u2"),
        np.tile(np.array([5, 0, 6, 0], "<u2"), 4),  # too few to say
        TOKENS.astype("<u4"),
        np.random.default_rng(1).integers(0, 100_352, 5000).astype("<u4"),
    ],
)
@pytest.mark.parametrize("vocab_size", [97, 50_257, 100_352])
def test_right_tokens_are_not_suspected(tokens, vocab_size):
    assert contradiction(tokens, vocab_size) is None


def test_a_wrong_width_later_in_the_file_is_found(tmp_path):
    from megatron_hybrid.data.validate import scan

    zeros = np.zeros(20_000_000, "<u2")
    with open(tmp_path / "a.npy", "wb") as file:
        zeros.tofile(file)
        TOKENS.astype("<u4").tofile(file)
    source = open_raw(tmp_path / "a.npy", None, 97)
    assert scan(source.shards[0], 97, 0, 100) == 0
    with pytest.raises(DataError, match="byte 40000000: read as uint16, every second token"):
        scan(source.shards[0], 97, 20_000_000)
