"""A checkpoint with random weights, its export, and downstream tasks, for comparisons of evaluators."""

from pathlib import Path

import torch.distributed as dist

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.convert.command import convert
from megatron_hybrid.convert.hf.exporter import to_huggingface
from megatron_hybrid.convert.hf.importer import from_huggingface
from megatron_hybrid.distributed.process_groups import leave_groups
from megatron_hybrid.evaluation.stdlib_tasks import write_stdlib_tasks
from testing.models import hybrid
from testing.peers import transformers_model

LENGTH = 512


def save_byte_tokenizer(folder: Path) -> None:
    """Save a Hugging Face tokenizer of 256 bytes and an end-of-document token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet | {"<end>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    fast.save_pretrained(str(folder))


def make_models(folder: Path) -> tuple[Path, Path]:
    """Return a checkpoint, and its export to a Hugging Face folder with a tokenizer."""
    model = ModelConfig(**hybrid("GGA", 64, 4, 16, vocab_size=257, eos_token_id=256))
    peer = transformers_model(model)
    peer.config.eos_token_id = 256
    peer.save_pretrained(str(folder / "made"))
    save_byte_tokenizer(folder / "made")
    checkpoint, export = folder / "checkpoint", folder / "export"
    convert(lambda: from_huggingface(folder / "made", checkpoint), checkpoint, quiet=True)
    convert(lambda: to_huggingface(checkpoint, export, positions=LENGTH), export, quiet=True)
    return checkpoint, export


def make_tasks(folder: Path) -> Path:
    """Return a folder of tasks."""
    write_stdlib_tasks(folder / "tasks")
    return folder / "tasks"


def by_hf_backend(export: Path, tasks: Path, limit: int) -> dict[str, dict]:
    """Return the results of lm-eval's own `hf` backend on an export."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from megatron_hybrid.evaluation.task_files import read_config, task_paths

    model = HFLM(pretrained=str(export), device="cpu", dtype="float32", batch_size=4, max_length=LENGTH)
    configs = [read_config(path) for path in task_paths(tasks)]
    manager = TaskManager(include_defaults=False)  # it would read 13,000 files
    options = dict(limit=limit, bootstrap_iters=0, log_samples=False)
    return simple_evaluate(model, tasks=configs, task_manager=manager, **options)["results"]


def ours(checkpoint: Path, tasks: Path, limit: int, lm_eval: bool) -> dict[str, dict]:
    """Return the results of this package on a model folder, by its own evaluator or by lm-eval."""
    return run_tasks_of(checkpoint, tasks, limit, LENGTH, lm_eval)


def run_tasks_of(folder: Path, tasks: Path, limit: int, max_length: int, lm_eval: bool = False) -> dict[str, dict]:
    """As `ours`, for a given longest sequence."""
    from megatron_hybrid.evaluation.run_tasks import run_tasks
    from megatron_hybrid.evaluation.task_model import TaskModel
    from megatron_hybrid.inference.load import load_model

    if dist.is_initialized():
        leave_groups()  # of a call before
    model = TaskModel.of(load_model(str(folder)), None, max_length, batch_size=4)
    return run_tasks(model, [str(tasks)], lm_eval, limit=limit)


def texts_of_both(checkpoint: Path, export: Path) -> tuple[list[str], list[str]]:
    """Return text that our model and lm-eval's `hf` backend generate from prompts of different lengths, up to a stop string."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from megatron_hybrid.evaluation.lm_eval_model import LmEvalModel
    from megatron_hybrid.evaluation.task_model import TaskModel
    from megatron_hybrid.inference.load import load_model

    leave_groups()
    ours_ = LmEvalModel(TaskModel.of(load_model(str(checkpoint)), None, LENGTH, batch_size=4))
    theirs = HFLM(pretrained=str(export), device="cpu", dtype="float32", batch_size=1, max_length=LENGTH)
    contexts = ["The month after June is", "x", "A longer prompt, " * 9, "while True:"]
    (free,) = ours_.generate_until(
        [Instance("generate_until", {}, (contexts[0], {"until": [], "max_gen_toks": 24}), 0)]
    )
    options = {"until": [free[12:13] or "."], "max_gen_toks": 24}
    requests = [Instance("generate_until", {}, (context, options), i) for i, context in enumerate(contexts)]
    return ours_.generate_until(requests), theirs.generate_until(requests)


def figures(results: dict[str, dict]) -> dict[tuple[str, str], float]:
    """Return every metric of every task, under the name without lm-eval's filter."""
    metrics = ("acc", "acc_norm", "acc_bytes", "exact_match")
    return {
        (task, name.partition(",")[0]): float(value)
        for task, values in results.items()
        for name, value in values.items()
        if name.partition(",")[0] in metrics
    }
