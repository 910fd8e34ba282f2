"""Measure the rates of a GPU, and under torchrun of a node's network, and write them as a hardware file (planner/gpus/*.yaml).

megatron-hybrid calibrate --gpu h100-80gb --output my-gpu.yaml
torchrun --nproc-per-node 8 --no-python megatron-hybrid calibrate --gpu h100-80gb --output my-node.yaml

The first measures one GPU: GEMMs, attention, recurrences, copies. The second also measures the collectives of a node.
"""

import datetime
import json
from pathlib import Path

from megatron_hybrid.base.errors import no_traceback
from megatron_hybrid.base.numbers import positive
from megatron_hybrid.config.command_line import CommandLine, check_output_file
from megatron_hybrid.config.presets import preset
from megatron_hybrid.launch import stop_signals


def main() -> int:
    """Run the command and return the exit status."""
    stop_signals.watch()
    parser = CommandLine(__doc__)
    parser.add_argument("--gpu", default="h100-80gb", help="hardware file for everything that is not measured")
    parser.add_argument("--model", default="olmo_hybrid_7b", help="preset at whose widths to measure")
    parser.add_argument("--tokens", type=positive, default=8192, help="tokens per micro-batch")
    parser.add_argument("--network-only", action="store_true", help="measure only the collectives")
    parser.add_argument("--output", type=Path, required=True, help="the hardware file to write")
    parser.add_argument("--points", type=Path, help="also write every measured point, as JSON (default: not written)")
    arguments = parser.parse()
    with no_traceback():
        from megatron_hybrid.planner.hardware import dump, load
        from megatron_hybrid.planner.points import from_points

        base, model = load(arguments.gpu), preset(arguments.model)
        check_output_file("--output", arguments.output)
        check_output_file("--points", arguments.points)
        import torch

        from megatron_hybrid.config.parallel import ParallelConfig
        from megatron_hybrid.distributed.device import has_cuda
        from megatron_hybrid.distributed.process_groups import stop_distributed
        from megatron_hybrid.launch.environment import Launch
        from megatron_hybrid.launch.start import start_distributed
        from megatron_hybrid.profiling.device_rates import collective_points, device_points

        launch = Launch.from_environment()
        start_distributed(launch, ParallelConfig(), seed=0)
        # every rank measures its own device, since an idle one would let the others clock higher
        points = [] if arguments.network_only else list(device_points(model, arguments.tokens))
        points += collective_points() if launch.world_size > 1 else []
        if launch.rank == 0:
            device = torch.cuda.get_device_name() if has_cuda() else "cpu"
            date = datetime.date.today().isoformat()
            ops = ", ".join(dict.fromkeys(point["op"] for point in points))
            measured = f"{ops} on {launch.world_size} x {device}, {date}; the rest as in {arguments.gpu}"
            memory = float(torch.cuda.get_device_properties(0).total_memory) if has_cuda() else base.memory_bytes
            found = from_points(points, model, base, name=device, measured=measured, memory_bytes=memory)
            comment = f"# Rates of {device} for the planner, in seconds, bytes and FLOPs, written by megatron-hybrid calibrate.\n"
            arguments.output.write_text(dump(found, comment), encoding="utf-8")
            if arguments.points:
                arguments.points.write_text(json.dumps(points))
            print(f"{len(points)} points measured; written to {arguments.output}")
        stop_distributed()
    return 0
