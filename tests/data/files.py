"""Small token files for tests."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_hybrid.config.data import SourceConfig
from megatron_hybrid.data.indexed import IndexedWriter
from megatron_hybrid.data.sources import TokenSource, open_source


def write_indexed(prefix: Path, documents: list[list[int]], dtype: str = "uint16") -> str:
    """`PREFIX.bin` and `PREFIX.idx` of documents; the prefix."""
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add(np.array(document, dtype), np.array([len(document)]))
        writer.finish()
    return str(prefix)


def write_raw(path: Path, tokens: np.ndarray | list[int], dtype: str = "uint16") -> str:
    """A .npy as OLMo-core writes it: no header."""
    np.asarray(tokens, dtype).tofile(path)
    return str(path)


def counting_source(path: Path, num_tokens: int) -> TokenSource:
    """A source whose token i is i."""
    return open_source(SourceConfig(path=write_raw(path, np.arange(num_tokens), "uint32"), dtype="uint32"), 1 << 20)


def save_tokenizer(folder: Path, words: list[str], eos: str) -> str:
    """A folder with a tokenizer whose words have the ids 0, 1, ...; the folder."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[1]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return str(folder)
