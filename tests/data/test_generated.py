"""Generated samples follow from seed, index and curriculum alone, and are padded to one length per size."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.data import DataConfig
from megatron_hybrid.data.blend import Blend
from megatron_hybrid.data.build import build_train_and_validation
from megatron_hybrid.data.curriculum import Curriculum
from megatron_hybrid.data.fingerprint import data_identity, identity_changes
from megatron_hybrid.data.generated import ENDLESS
from megatron_hybrid.data.loader import BatchLoader
from megatron_hybrid.train.callbacks.curriculum_progress import CurriculumProgress
from megatron_hybrid.train.progress import Progress

STAGES = [{"size": 4, "samples": 64}, {"size": 8, "samples": 64}, {"size": 32}]


def data(seed: int = 1, labels: str = "answers", stages=STAGES, **options) -> tuple[Blend, Curriculum]:
    config = DataConfig.model_validate(
        dict(
            train=[{"generator": {"task": "state_tracking", "size": 8, "labels": labels} | options}],
            validation={"n4": [{"generator": {"task": "state_tracking", "size": 4, "labels": "last"}}]},
            sequence_length=512,
            curriculum=stages,
            seed=seed,
        )
    )
    curriculum = Curriculum(config.curriculum) if stages else None
    train, validation = build_train_and_validation(config, 16, curriculum=curriculum)
    assert validation["n4"].sequence_length == 64 and validation["n4"].samples_without_repeats() == ENDLESS
    return train, curriculum


def tokens(blend: Blend, indices) -> list[list[int]]:
    return [blend.sample(index).tokens.tolist() for index in indices]


def test_samples_follow_from_seed_and_index():
    one, other = data()[0], data()[0]
    assert tokens(one, range(40)) == tokens(other, reversed(range(40)))[::-1]
    assert len({*map(tuple, tokens(one, range(64)))}) == 64
    assert tokens(one, range(5)) != tokens(data(seed=2)[0], range(5))


def test_sizes_follow_the_curriculum():
    blend, curriculum = data()
    assert [len(blend.sample(i).tokens) for i in (0, 63, 64, 127, 128, 10**9)] == [64, 64, 128, 128, 320, 320]
    assert blend.sequence_length == 320
    curriculum.advance(32)
    assert [curriculum.size_at(i) for i in (31, 32, 95, 96)] == [4, 8, 8, 32]
    again = data()[1]
    again.load_state_dict(curriculum.state_dict())
    assert [again.size_at(i) for i in (31, 32, 95, 96)] == [4, 8, 8, 32]
    for starts in ([0, 5], [0, 9, 9], [1, 2, 3]):
        with pytest.raises(ValueError, match="cannot begin them"):
            again.load_state_dict({"starts": starts})


def two_sources(**fields) -> tuple[Blend, Curriculum]:
    tasks = [{"generator": {"task": "state_tracking", "size": size}, "weight": w} for size, w in ((4, 0.75), (8, 0.25))]
    config = DataConfig.model_validate(dict(train=tasks, sequence_length=512, **fields))
    curriculum = Curriculum(config.curriculum)
    return build_train_and_validation(config, 16, curriculum=curriculum if config.curriculum else None)[0], curriculum


def test_stages_begin_at_samples_of_the_blend():
    blend, _ = two_sources(curriculum=STAGES)
    lengths = [len(blend.sample(i).tokens) for i in range(192)]
    assert lengths == [64] * 64 + [128] * 64 + [320] * 64


def test_a_mix_changes_after_tokens_of_generated_samples():
    blend, _ = two_sources(mix_changes=[{"after_tokens": 100 * 128, "weights": [0.0, 1.0]}])
    assert blend.sequence_length == 128
    assert blend.counts(100) == [75, 25] and blend.counts(140) == [75, 65]


@pytest.mark.parametrize(
    ("samples", "size", "fits"), [(0, 8, True), (4, 8, False), (4, 4, True), (124, 8, False), (128, 8, True)]
)
def test_a_changed_batch_size_must_fit_the_stages_that_are_left(samples, size, fits):
    _, curriculum = data()
    lines: list[str] = []
    run = SimpleNamespace(
        curriculum=curriculum,
        progress=Progress(samples=samples),
        config=SimpleNamespace(train=SimpleNamespace(global_batch_size=size)),
        logger=SimpleNamespace(info=lines.append),
    )
    if fits:
        CurriculumProgress(None).start(run)
        assert len(lines) == 1
    else:
        with pytest.raises(
            ConfigError, match=f"train.global_batch_size: {size} would put samples of two stages into a batch"
        ):
            CurriculumProgress(None).start(run)


def test_labels_that_count():
    counted = {}
    for labels in ("all", "answers", "last"):
        sample = data(labels=labels, stages=())[0].sample(3)
        places = np.flatnonzero(sample.loss_mask)
        counted[labels] = places.tolist()
        counts = sample.counts
        assert counts.counted == len(places)
        assert counts.counted + counts.crossing + counts.filtered + counts.padding == counts.slots == 128
        assert (sample.labels[places] > 0).all() and (sample.tokens[1:] == sample.labels[:-1]).all()
    assert counted["all"] == [*range(len(counted["all"]))] and len(counted["answers"]) == 2
    assert counted["last"] == counted["answers"][-1:] == counted["all"][-1:]


def test_hidden_answers_are_labels_and_not_inputs():
    shown, hidden = data(stages=())[0].sample(3), data(stages=(), show_answers=False)[0].sample(3)
    answers = np.flatnonzero(shown.loss_mask) + 1
    assert (hidden.labels == shown.labels).all() and (hidden.loss_mask == shown.loss_mask).all()
    assert len(answers) == 2 and np.flatnonzero(hidden.tokens != shown.tokens).tolist() == [answers[0]]
    assert hidden.tokens[answers[0]] == 0, "the last answer is no input in either"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_data_parallel_size_reads_the_same_samples(size):
    def read(ranks: int) -> torch.Tensor:
        rows: dict[tuple[int, int], torch.Tensor] = {}
        for rank in range(ranks):
            with BatchLoader(data()[0], 2, data_parallel_rank=rank, data_parallel_size=ranks) as loader:
                for step in range(3):
                    for number, batch in enumerate(loader.global_batch(32 + 16 * step, 16)):
                        rows[step * 100 + number * ranks + rank] = torch.nn.functional.pad(
                            batch.tokens, (0, 320 - batch.tokens.shape[1])
                        )
        return torch.cat([rows[key] for key in sorted(rows)])

    assert torch.equal(read(size), read(1))


def test_an_early_stage_takes_effect_after_reading_ahead_is_discarded():
    blend, curriculum = data()
    with BatchLoader(blend, 16, num_workers=1) as loader:
        next(loader.global_batch(0, 16))
        curriculum.advance(16)
        loader.discard_read_ahead()
        assert next(loader.global_batch(16, 16)).tokens.shape == (16, 128)


def test_the_identity_names_options_and_curriculum():
    before = data_identity(data()[0], 1)
    assert identity_changes(before, data_identity(data()[0], 1)) == {}
    assert [*identity_changes(before, data_identity(data(variables=4)[0], 1))] == ["data.train.0.generator"]
    changed = [{"size": 4, "samples": 64}, {"size": 32}]
    assert [*identity_changes(before, data_identity(data(stages=changed)[0], 1))] == ["data.curriculum"]
