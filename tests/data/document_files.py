"""Random documents in the formats whose boundaries are read, and a plain list of them."""

import gzip
from pathlib import Path

import numpy as np

from megatron_hybrid.config.data import SourceConfig
from megatron_hybrid.data.source_documents import DocumentFinder, SourceDocuments
from megatron_hybrid.data.sources import TokenSource, open_source
from megatron_hybrid.data.work_files import WorkFiles
from tests.data.files import write_indexed, write_raw

EOS = 0
VOCABULARY = 60_000


def random_documents(random: np.random.Generator, count: int, longest: int) -> list[list[int]]:
    """Documents that end with EOS, some of one token. No token but EOS occurs twice, so that a token names its place."""
    lengths = random.choice([1, 2, longest], count, p=[0.3, 0.2, 0.5])
    lengths = np.where(lengths == longest, random.integers(1, longest + 1, count), lengths)
    numbers = iter(range(1, VOCABULARY))
    return [[next(numbers) for _ in range(length - 1)] + [EOS] for length in lengths.tolist()]


def write_metadata(path: Path, lengths: list[int]) -> None:
    """The `.csv.gz` that the Dolma toolkit writes next to a `.npy`."""
    ends = np.cumsum(lengths).tolist()
    with gzip.open(path, "wt") as file:
        for number, (length, end) in enumerate(zip(lengths, ends, strict=True)):
            file.write(f"{end - length},{end},doc-{number},s3://corpus/part.jsonl.gz,{number + 1}\n")


def write_corpus(folder: Path, documents: list[list[int]], kind: str) -> TokenSource:
    """A source of documents: `index`, or `metadata` or `tokens` in three files."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "index":
        return open_source(SourceConfig(path=write_indexed(folder / "corpus", documents)), VOCABULARY)
    cuts = [0, len(documents) // 3, len(documents) // 2, len(documents)]
    for part, (first, last) in enumerate(zip(cuts, cuts[1:], strict=False)):
        inside = documents[first:last]
        write_raw(folder / f"part-{part}.npy", [token for document in inside for token in document])
        if kind == "metadata":
            write_metadata(folder / f"part-{part}.csv.gz", [len(document) for document in inside])
    return open_source(SourceConfig(path=str(folder / "*.npy")), VOCABULARY)


def find_documents(source: TokenSource, folder: Path, eos_token_id: int | None = EOS) -> SourceDocuments:
    """The documents of all files of a source, found in this process."""
    finder = DocumentFinder(source, eos_token_id, WorkFiles(folder))
    for number in range(len(finder.names)):
        finder.find(number)
    return finder.open()
