"""Layer patterns and pipeline stages: what holds for all of them, over many drawn at random."""

import random
import time

import pytest

from megatron_hybrid.arch.patterns import MAX_LAYERS, expand_pattern, fold_pattern
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.parallel import ParallelConfig

TITLES = {"G": "Gated DeltaNet", "A": "attention", "W": "sliding-window attention"}


def test_expand_by_hand() -> None:
    assert "".join(expand_pattern("GGGA*2,GA", TITLES)) == "GGGAGGGAGA"
    assert "".join(expand_pattern(" G * 2 , W", TITLES)) == "GGW"


def test_expand_and_fold_random_patterns() -> None:
    draw = random.Random(0)
    for _ in range(300):
        groups = [
            ("".join(draw.choices("GAW", k=draw.randint(1, 5))), draw.randint(1, 9)) for _ in range(draw.randint(1, 4))
        ]
        pattern = ",".join(unit + (f"*{n}" if n > 1 or draw.random() < 0.5 else "") for unit, n in groups)
        layers = expand_pattern(pattern, TITLES)
        assert "".join(layers) == "".join(unit * n for unit, n in groups)
        folded = fold_pattern(layers)
        assert expand_pattern(folded, TITLES) == layers and len(folded) <= len(layers)
    assert fold_pattern(expand_pattern("GGGA*7,GGA", TITLES)) == "GGGA*7,GGA"


@pytest.mark.parametrize(
    "pattern",
    ["", ",", "B", "GGGA*", "GGGA*-1", "GGGA*1.5", "*8", "GGGA**2", "8*GGGA", "G A,", "GGGA*08", "G\n", "(GA)*2"],
)
def test_malformed_patterns(pattern: str) -> None:
    with pytest.raises(ValueError, match="is not a group of layers"):
        expand_pattern(pattern, TITLES)


def test_absurd_patterns_neither_hang_nor_eat_memory() -> None:
    start = time.process_time()
    for pattern in ("GGGA*999999999", "G*" + "9" * 10**5, "G" * 10**6, ",".join(["GGGA*999"] * 10**4)):
        with pytest.raises(ValueError, match=f"more than {MAX_LAYERS} layers") as caught:
            expand_pattern(pattern, TITLES)
        assert len(str(caught.value)) < 300
    assert len(expand_pattern(f"G*{MAX_LAYERS}", TITLES)) == MAX_LAYERS
    assert time.process_time() - start < 1


def test_stage_layers_of_many_splits() -> None:
    draw = random.Random(1)
    for _ in range(500):
        pipeline = draw.randint(1, 8)
        virtual = draw.randint(1, 4) if pipeline > 1 else 1
        parallel = ParallelConfig(pipeline_parallel_size=pipeline, virtual_pipeline_parallel_size=virtual)
        layers = draw.randint(1, 64)
        if layers < parallel.num_stages:
            with pytest.raises(ConfigError, match="stages exceed"):
                parallel.stage_layers(layers)
            continue
        stages = parallel.stage_layers(layers)
        assert len(stages) == parallel.num_stages and sum(stages) == layers
        assert max(stages) - min(stages) <= 1 and min(stages) >= 1
        longer = [index for index, count in enumerate(stages) if count > min(stages)]
        assert longer == list(range(longer[0], longer[-1] + 1)) if longer else True  # in one piece, ...
        if longer:  # ... in the middle
            assert abs(longer[0] - (len(stages) - 1 - longer[-1])) <= 1


def test_a_given_split_is_taken() -> None:
    parallel = ParallelConfig(pipeline_parallel_size=2, virtual_pipeline_parallel_size=2, pipeline_split=(1, 3, 3, 1))
    assert parallel.stage_layers(8) == (1, 3, 3, 1)


def test_remedies_for_too_many_stages_are_legal() -> None:
    """The remedy in a message of stage_layers is accepted."""
    for pipeline in range(2, 12):
        for virtual in range(1, 8):
            for layers in range(1, min(40, pipeline * virtual)):
                parallel = ParallelConfig(pipeline_parallel_size=pipeline, virtual_pipeline_parallel_size=virtual)
                with pytest.raises(ConfigError) as caught:
                    parallel.stage_layers(layers)
                text = str(caught.value).partition("; ")[2]
                numbers = [int(word) for word in text.split() if word.isdigit()]
                if text.startswith("set virtual"):
                    virtual_, pipeline_ = numbers[0], pipeline
                else:
                    pipeline_, virtual_ = numbers[0], 1 if "virtual" in text else virtual
                remedied = ParallelConfig(pipeline_parallel_size=pipeline_, virtual_pipeline_parallel_size=virtual_)
                assert sum(remedied.stage_layers(layers)) == layers
