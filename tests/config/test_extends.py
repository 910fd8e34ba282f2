"""Files of configuration that extend others."""

import pytest

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.load import load_run

BASE = """
run_dir: runs/a
model: olmo_hybrid_tiny
data: {train: [{path: a}, {path: b}], sequence_length: 64}
train: {steps: 10, global_batch_size: 4, optimizer: {lr: 1e-3, weight_decay: 0.2}}
"""


@pytest.fixture
def files(tmp_path):
    """`files(name=text, ...)`: writes them and returns the path of the last."""

    def write(**texts: str) -> str:
        for name, text in texts.items():
            path = tmp_path / f"{name}.yaml"
            path.write_text(text)
        return str(path)

    return write


def test_sections_are_merged_and_lists_and_null_replace(files):
    over = "extends: base.yaml\ndata: {train: [{path: c}]}\ntrain: {optimizer: {lr: 2e-3}}\nmodel: {rope_theta: null}"
    run = load_run(files(base=BASE, over=over), ["train.steps=11"])
    assert [source.path for source in run.data.train] == ["c"] and run.data.sequence_length == 64
    assert (run.train.steps, run.train.optimizer.lr, run.train.optimizer.weight_decay) == (11, 2e-3, 0.2)
    assert run.model.rope_theta is None and run.model.hidden_size == 128


def test_a_preset_replaces_the_model(files):
    middle = "extends: base.yaml\nmodel: {rope_theta: null, layer_pattern: GA}"
    last = "extends: middle.yaml\nmodel: {base_preset: olmo_hybrid_tiny, layer_pattern: GGGA}"
    run = load_run(files(base=BASE, middle=middle, last=last))
    assert run.model.rope_theta == 500_000.0 and len(run.model.layers) == 4


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("extends: none.yaml", "extends: none.yaml in .*over.yaml: there is no file .*none.yaml; correct the path"),
        ("extends: [base.yaml]", "extends: .* is not a file; give its path"),
        ("extends: loop.yaml", "extends: over.yaml in .*loop.yaml extends .* itself"),
        ("extends: over.yaml", "extends itself|extends .*over.yaml itself"),
    ],
)
def test_what_cannot_be_extended(text, error, files):
    with pytest.raises(ConfigError, match=error):
        load_run(files(base=BASE, loop="extends: over.yaml", over=text))
