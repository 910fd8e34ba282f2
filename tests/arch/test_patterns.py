"""Layer patterns and pipeline stages: what holds for all of them, over many drawn at random."""

import itertools
import random

import pytest

from megatron_hybrid.arch.flops import output_in_layers
from megatron_hybrid.arch.patterns import MAX_LAYERS, expand_pattern, fold_pattern
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.presets import preset
from testing.bounded import outcome

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
    def expand() -> None:
        for pattern in ("GGGA*999999999", "G*" + "9" * 10**5, "G" * 10**6, ",".join(["GGGA*999"] * 10**4)):
            with pytest.raises(ValueError, match=f"more than {MAX_LAYERS} layers") as caught:
                expand_pattern(pattern, TITLES)
            assert len(str(caught.value)) < 300
        assert len(expand_pattern(f"G*{MAX_LAYERS}", TITLES)) == MAX_LAYERS

    assert outcome(expand) == "no error"


def test_stage_layers_of_many_splits() -> None:
    """No split makes the slowest pipeline rank faster, by search over all splits between ranks."""
    draw = random.Random(1)
    for _ in range(300):
        ranks = draw.randint(1, 4)
        virtual = draw.randint(1, 4) if ranks > 1 else 1
        parallel = ParallelConfig(pipeline_parallel_size=ranks, virtual_pipeline_parallel_size=virtual)
        layers, output = draw.randint(1, 20), draw.choice([0.0, 0.4, 1.0, 1.6, 2.4, 9.0])
        if layers < parallel.num_stages:
            with pytest.raises(ConfigError, match="stages exceed"):
                parallel.stage_layers(layers, output)
            continue
        stages = parallel.stage_layers(layers, output)
        assert len(stages) == parallel.num_stages and sum(stages) == layers and min(stages) >= 1
        loads = [sum(stages[rank::ranks]) for rank in range(ranks)]
        assert max(loads[:-1], default=0) - min(loads[:-1], default=0) <= 1 and loads[-1] <= min(loads)
        slowest = max(*loads[:-1], loads[-1] + output) if ranks > 1 else loads[0] + output
        counts = [c for c in itertools.product(range(virtual, layers + 1), repeat=ranks) if sum(c) == layers]
        assert slowest == min(max([*c[:-1], c[-1] + output]) for c in counts)
        for rank in range(ranks):
            assert max(stages[rank::ranks]) - min(stages[rank::ranks]) <= 1


def test_the_last_rank_has_fewer_layers_for_the_output() -> None:
    """The splits that were fastest on two H200s among those tried by hand, for OLMo Hybrid 7B."""
    model = preset("olmo_hybrid_7b")
    parallel = ParallelConfig(pipeline_parallel_size=2, virtual_pipeline_parallel_size=4)
    for fp8, measured in ((False, 1.6), (True, 2.4)):
        estimate = output_in_layers(model, fp8)
        assert estimate == pytest.approx(measured, rel=0.25)
        assert {parallel.stage_layers(32, x) for x in (estimate, measured)} == {(4, 4, 4, 4, 4, 4, 5, 3)}


def test_a_given_split_is_taken() -> None:
    parallel = ParallelConfig(pipeline_parallel_size=2, virtual_pipeline_parallel_size=2, pipeline_split=(1, 3, 3, 1))
    assert parallel.stage_layers(8, 1.0) == (1, 3, 3, 1)


def test_remedies_for_too_many_stages_are_legal() -> None:
    """The remedy in a message of stage_layers is accepted."""
    for pipeline in range(2, 12):
        for virtual in range(1, 8):
            for layers in range(1, min(40, pipeline * virtual)):
                parallel = ParallelConfig(pipeline_parallel_size=pipeline, virtual_pipeline_parallel_size=virtual)
                with pytest.raises(ConfigError) as caught:
                    parallel.stage_layers(layers, 0.0)
                text = str(caught.value).partition("; ")[2]
                numbers = [int(word) for word in text.split() if word.isdigit()]
                if text.startswith("set virtual"):
                    virtual_, pipeline_ = numbers[0], pipeline
                else:
                    pipeline_, virtual_ = numbers[0], 1 if "virtual" in text else virtual
                remedied = ParallelConfig(pipeline_parallel_size=pipeline_, virtual_pipeline_parallel_size=virtual_)
                assert sum(remedied.stage_layers(layers, 0.0)) == layers
