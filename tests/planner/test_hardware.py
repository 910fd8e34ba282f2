"""Hardware files, and rates fitted to measured points."""

import json

import pytest

from megatron_hybrid.arch.costs import Gemm, attention_flops
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.presets import olmo_hybrid_7b
from megatron_hybrid.planner.hardware import FOLDER, RENAMED, Rate, dump, interpolate, load
from megatron_hybrid.planner.network import hops, wire_bytes
from megatron_hybrid.planner.points import COLLECTIVES, from_points, memory_bytes_per_token

NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_what_ships_reads_back(name, tmp_path):
    hardware = load(name)
    (tmp_path / "copy.yaml").write_text(dump(hardware))
    assert dump(load(str(tmp_path / "copy.yaml"))) == dump(hardware)
    assert hardware.measured and 4e10 < hardware.memory_bytes < 3e11
    for form in ("bf16", "tensorwise", "delayed", "blockwise"):
        assert set(hardware.linear[form]) == {"forward", "backward"}
        peak = hardware.peak_flops * (1 if form == "bf16" else 2)
        assert all(1 / rate.per_flop <= peak for rate in hardware.linear[form].values())


def test_files_with_earlier_names_load(tmp_path):
    text, earlier = dump(load("h200")), {new: old for old, new in RENAMED.items()}
    for new, old in earlier.items():
        text = text.replace(f"{new}:", f"{old}:")
    assert "delta_rule:" in text and "fp8_tensorwise:" in text and "recurrence:" not in text
    (tmp_path / "old.yaml").write_text(text)
    assert dump(load(str(tmp_path / "old.yaml"))) == dump(load("h200"))


def test_an_unknown_gpu_names_the_nearest():
    with pytest.raises(ConfigError, match="the nearest of .* is h100-80gb"):
        load("h100-80g")


def test_a_file_that_is_something_else_says_so(tmp_path):
    (tmp_path / "a.yaml").write_text("name: x\n")
    with pytest.raises(ConfigError, match="is not a hardware file"):
        load(str(tmp_path / "a.yaml"))


def test_rates_are_found_again_in_the_points_they_made():
    base, model, true = load("h200"), olmo_hybrid_7b(), Rate(1e-5, 1 / 7e14, 1 / 4e12)
    points = []
    for way in ("forward", "backward"):
        for m, n, k in ((8192, 17344, 3840), (8192, 3840, 5760), (2048, 3840, 1440), (8192, 22016, 3840)):
            gemm = Gemm(m, n, k)
            seconds = true.seconds(gemm.flops(way), gemm.bytes(way))
            points.append({"op": "linear", "format": "bf16", "pass": way, "m": m, "n": n, "k": k, "seconds": seconds})
        for rows, seconds in ((15, 2e-4), (30, 3e-4)):
            sizes = {"sequence": 16384, "batch": 1, "heads": rows, "key_head_dim": 96, "value_head_dim": 192}
            points.append({"op": "recurrence", "pass": way, "seconds": seconds, **sizes})
        size = 8192 * memory_bytes_per_token(model, "conv_gates", 2, way)
        points.append({"op": "conv_gates", "pass": way, "tokens": 8192, "degree": 2, "seconds": size / 2e12})
    points.append({"op": "copy", "pass": "none", "bytes": 8e9, "seconds": 2e-3})
    for size in (2**16, 2**24, 2**29):
        seconds = hops("all_gather", 4) * 5e-6 + wire_bytes("all_gather", 4, size) / 3e11
        points.append({"op": "all_gather", "pass": "none", "ranks": 4, "bytes": size, "seconds": seconds})
    found = from_points(points, model, base)
    for way in ("forward", "backward"):
        rate = found.linear["bf16"][way]
        assert (rate.latency, rate.per_flop, rate.per_byte) == pytest.approx(
            (true.latency, true.per_flop, true.per_byte), rel=1e-3
        )
    assert found.recurrence_seconds("forward", 8192, 15, 96 * 192) == pytest.approx(1e-4)
    assert found.copy_bytes_per_second == 4e12 and found.copy_efficiency["conv_gates"] == pytest.approx(0.5)
    assert (found.intra_node["all_gather"].latency, found.intra_node["all_gather"].bytes_per_second) == pytest.approx(
        (5e-6, 3e11)
    )
    assert found.intra_node["all_reduce"] == base.intra_node["all_reduce"], "what was not measured stays"


def test_rates_of_the_h200_are_those_of_its_points(root):
    measured = json.loads((root / "benchmarks" / "measured" / "points-h200.json").read_text())
    # collectives were measured on two GPUs for the points, and on four for the file
    points = [point for point in measured if point["op"] not in COLLECTIVES]
    operations = {"copy", "linear", "attention", "recurrence"}
    assert {point["op"] for point in points} == operations
    shipped = load("h200")
    assert dump(from_points(points, olmo_hybrid_7b(), shipped)) == dump(shipped)


def test_between_points_times_are_linear():
    table = [(10.0, 1.0), (20.0, 2.0), (40.0, 6.0)]
    assert [interpolate(table, x) for x in (10, 15, 30, 50)] == [1.0, 1.5, 4.0, 8.0]


def test_attention_counts_the_pairs_that_are_seen():
    by_hand = sum(min(i + 1, 8) for i in range(64)) * 4 * 128
    assert attention_flops(64, 1, 128, "forward", window=8) == pytest.approx(by_hand, rel=0.01)
    assert attention_flops(64, 2, 128, "forward") == pytest.approx(2 * 4 * 128 * 64 * 64 / 2)
