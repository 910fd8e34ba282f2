"""Write the counts of a fault-injection campaign (tests/faults/campaign.sh) as a result file.

python benchmarks/faults.py saves ROWS.json      writes benchmarks/results/faults_saves-cpu.json
"""

import json
import sys
from pathlib import Path

import report


def main() -> None:
    part, rows = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    report.write(
        f"faults_{part}",
        [
            report.row(r["case"], r["metric"], r["unit"], r["ours"]) if r["goal"] is None else report.bounded(**r)
            for r in rows
        ],
        packages=("torch", "megatron-core", "safetensors"),
        command=f"bash tests/faults/campaign.sh {part}",
    )


if __name__ == "__main__":
    main()
