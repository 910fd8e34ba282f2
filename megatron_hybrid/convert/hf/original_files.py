"""Files next to a model's weights and config.json: tokenizer, chat templates, processors of images, generation_config.json.

An import keeps them in the checkpoint's `original/` folder (checkpoint/origin.py), byte for byte.
"""

from pathlib import Path
from typing import Any

from megatron_hybrid.checkpoint.origin import FOLDER
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.io.folder import has_file, read_json, regular_file

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt")
"""A folder with a tokenizer has at least one of these."""
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""What turns images and videos into the inputs of a vision tower, whose weights a checkpoint keeps."""
_TEMPLATES = "additional_chat_templates"
GENERATION_CONFIG = "generation_config.json"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Return the tokenizer files of a folder, by their name in it."""
    found = {name: regular_file(folder, name) for name in TOKENIZER_FILES if has_file(folder, name)}
    templates = folder / _TEMPLATES
    if templates.is_dir() and not templates.is_symlink():
        names = sorted(path.name for path in templates.glob("*.jinja"))
        found |= {f"{_TEMPLATES}/{name}": regular_file(templates, name) for name in names}
    return found


def processor_files(folder: Path) -> dict[str, Path]:
    """Return the processor files of a folder, by their name in it."""
    return {name: regular_file(folder, name) for name in PROCESSOR_FILES if has_file(folder, name)}


def given_tokenizer(folder: Path) -> dict[str, Path]:
    """Return the tokenizer files of the folder that `--tokenizer` names.

    Raises:
        ConversionError: the folder has no tokenizer.
    """
    found = tokenizer_files(folder)
    if not found.keys() & set(_TOKENIZERS):
        raise ConversionError(f"{folder}: no tokenizer is there; it should hold {', '.join(TOKENIZER_FILES[:3])}")
    return found


def original_files(folder: Path) -> dict[str, Path]:
    """Return the files of a Hugging Face folder that a checkpoint keeps.

    Raises:
        ConversionError: generation_config.json is damaged.
    """
    found = tokenizer_files(folder) | processor_files(folder)
    if has_file(folder, GENERATION_CONFIG):
        found[GENERATION_CONFIG] = regular_file(folder, GENERATION_CONFIG)
        read_json(found[GENERATION_CONFIG])
    return found


def kept_files(checkpoint: Path) -> dict[str, Path]:
    """Return the files that a checkpoint keeps. There are none if it was not converted from a Hugging Face folder."""
    folder = checkpoint / FOLDER
    return original_files(folder) if folder.is_dir() and not folder.is_symlink() else {}


def left_out(folder: Path, taken: set[str]) -> list[str]:
    """Return the names in a Hugging Face folder that an import does not use."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    return sorted(names - taken - {_TEMPLATES, *(Path(name).parts[0] for name in taken)})


def generation_config(config: dict[str, Any], kept: Path | None) -> tuple[dict[str, Any], list[str]]:
    """Return the generation_config.json of an export, and notes for the user.

    Args:
        config: the export's config.json.
        kept: the original model's generation_config.json.
    """
    tokens = {name: config[name] for name in _TOKENS if config[name] is not None}
    if kept is None:
        return tokens, []
    found = read_json(kept)
    result, notes = tokens | {name: value for name, value in found.items() if value is not None}, []
    ends = found.get("eos_token_id")
    mine = tokens.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    missing = [token for token in (mine if isinstance(mine, list) else [mine]) if token not in (None, *listed)]
    if ends is not None and missing:
        result["eos_token_id"] = [*missing, *listed]
        notes.append(
            f"{GENERATION_CONFIG}: eos_token_id {ends!r:.100} from the original model, and {missing} from this one"
        )
    return result, notes
