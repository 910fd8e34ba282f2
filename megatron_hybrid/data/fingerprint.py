"""Identity of the training data: everything that determines the tokens of sample n of a run.

It is kept in every checkpoint and compared on resume. It depends on the token streams alone: files may be moved,
renamed or split in another way as long as the stream of tokens stays the same.
"""

import hashlib
from typing import Any

import numpy as np

from megatron_hybrid.data.blend import Blend, Dataset
from megatron_hybrid.data.document_dataset import DocumentDataset
from megatron_hybrid.data.generated import GeneratedDataset
from megatron_hybrid.data.sources import TokenSource

PLACES, LENGTH = 256, 256
"""Places of a stream that are compared, evenly spaced from its first to its last token, and tokens per place."""


def stream_digest(source: TokenSource) -> str:
    """Return a hash of tokens from `PLACES` places of a stream (32 hexadecimal digits)."""
    length = min(LENGTH, source.num_tokens)
    digest = hashlib.blake2b(digest_size=16)
    for start in np.unique(np.linspace(0, source.num_tokens - length, PLACES).astype(np.int64)):
        digest.update(source.read(int(start), length).tobytes())
    return digest.hexdigest()


def documents_digest(dataset: Dataset) -> str | None:
    """Return a hash of the documents that a dataset separates (32 hexadecimal digits); None: it separates none."""
    documents = dataset.reader.documents if isinstance(dataset, DocumentDataset) else None
    if documents is None:
        return None
    # The number of samples tells mask from pack: packing the documents of a stream always takes more.
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((documents.num_documents, dataset.samples_per_epoch)).encode())
    for place in np.unique(np.linspace(0, documents.num_documents - 1, PLACES).astype(np.int64)):
        digest.update(documents.bounds(int(place), int(place) + 1).tobytes())
    return digest.hexdigest()


def _source_identity(dataset: Dataset) -> dict[str, Any]:
    """Return what determines the samples of a dataset, but for their order, which follows from the seed."""
    if isinstance(dataset, GeneratedDataset):
        stages = dataset.curriculum.stages if dataset.curriculum else ()
        curriculum = [stage.model_dump(mode="json") for stage in stages]
        return {"generator": dataset.generator.model_dump(mode="json"), "curriculum": curriculum}
    found = {"tokens": dataset.source.num_tokens, "digest": stream_digest(dataset.source)}
    documents = documents_digest(dataset)
    return found | ({"documents": documents} if documents else {})


def data_identity(blend: Blend, seed: int) -> dict[str, Any]:
    """Return everything that determines the order and the content of a blend's samples, as JSON values.

    Returns:
        `sequence_length` (tokens), `seed`, and `sources`: for each its `share` of the samples, its `tokens` and `digest`, and
        `documents`, a hash, if they are separated. A generator has its options and the stages of the curriculum instead.
        `mix_changes`, if there are any: first sample and shares of each.
    """
    sources = [
        {**_source_identity(dataset), "share": share}
        for dataset, share in zip(blend.datasets, blend.shares, strict=True)
    ]
    identity = {"sequence_length": blend.sequence_length, "seed": seed, "sources": sources}
    if blend.changes:
        identity["mix_changes"] = [[first, list(shares)] for first, shares in blend.changes]
    return identity


def identity_changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    """Return `{field: what changed}` between two identities, such as `{"data.seed": "1234 before, 9 now"}`."""
    changes = {
        f"data.{name}": f"{before[name]} before, {after[name]} now"
        for name in ("sequence_length", "seed")
        if before[name] != after[name]
    }
    old, new = before["sources"], after["sources"]
    if len(old) != len(new):
        return changes | {"data.train": f"{len(old)} sources before, {len(new)} now"}
    for index, (one, other) in enumerate(zip(old, new, strict=True)):
        field = f"data.train.{index}"
        if one.get("generator") != other.get("generator"):
            changes[f"{field}.generator"] = f"{_options(one)} before, {_options(other)} now"
        elif one.get("curriculum") != other.get("curriculum"):
            changes["data.curriculum"] = f"{one['curriculum']} before, {other['curriculum']} now"
        elif one.get("tokens") != other.get("tokens"):
            changes[field] = f"{one['tokens']:,} tokens before, {other['tokens']:,} now"
        elif one.get("digest") != other.get("digest"):
            changes[field] = f"other tokens than before ({other['tokens']:,}, as many as before)"
        if one.get("documents") != other.get("documents"):
            changes[f"{field}.documents"] = "other document boundaries, or another data.documents, than before"
        if one["share"] != other["share"]:
            changes[f"{field}.weight"] = f"{one['share']:.4g} of the samples before, {other['share']:.4g} now"
    mixes = [identity.get("mix_changes", []) for identity in (before, after)]
    if mixes[0] != mixes[1]:
        changes["data.mix_changes"] = "{} before, {} now (first sample, shares)".format(*mixes)
    return changes


def _options(source: dict[str, Any]) -> str:
    """Return the options of a generator; of files that they are not generated."""
    return str(source["generator"]) if "generator" in source else "files"
