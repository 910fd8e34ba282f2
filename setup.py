"""Packaging. Two top-level packages: megatron_hybrid, and hybrid_kernels, which lies in kernels/.

`kernels/` itself is no package: a top-level `kernels` would shadow Hugging Face's, which transformers imports.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_hybrid" / "__init__.py").read_text())[1]
README = ROOT / "README.md"

# Exact, so that a run starts the same way next year. tests/test_packaging.py compares them with what is installed.
REQUIREMENTS = [
    "torch==2.11.0",
    "megatron-core==0.19.2",
    "transformers==5.23.0",
    "tokenizers==0.23.3",
    "safetensors==0.8.0",
    "numpy==2.5.5",
    "einops==0.8.2",
    "jinja2==3.1.6",
    "pydantic==2.14.3",
    "pyyaml==6.0.3",
    "zstandard==0.25.0",
    "psutil==7.2.2",
    "rich==15.0.0",
    "tensorboard==2.21.0",
    "matplotlib==3.11.2",
]
EXTRAS = {
    # Transformer Engine's torch part is compiled on installation: torch must be there first, and build isolation off
    # (tools/env.sh does both). TileLang: fla's gated delta rule needs it for the backward pass on Hopper.
    "gpu": ["transformer-engine[core_cu13,pytorch]==2.20.2", "flash-linear-attention==0.6.0"],
    "tilelang": ["tilelang==0.1.15"],
    "deepspeed": ["deepspeed==0.19.8"],
    "tasks": ["lm_eval==0.4.13"],
    "olmo-core": ["ai2-olmo-core==3.0.0"],  # only tests read what it writes
    "mpi": ["mpi4py==4.1.2"],
    "wandb": ["wandb==0.31.0"],
    "parquet": ["pyarrow==26.0.1"],
    "dev": [
        "pytest==9.2.0",
        "pytest-timeout==2.4.0",
        "pytest-xdist==3.8.0",
        "ruff==0.17.6",
        "mypy==2.4.1",
        "types-PyYAML==6.0.12.20261113",
        "deepspeed==0.19.8",  # for its tests on CPU ranks
        "mkdocs-material==9.8.2",
        "setuptools>=77,<82",
    ],
}

setup(
    name="megatron-hybrid",
    version=VERSION,
    description="Pretraining of hybrid Gated DeltaNet and attention language models on megatron-core",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_hybrid*"]) + find_packages("kernels", include=["hybrid_kernels*"]),
    package_dir={"megatron_hybrid": "megatron_hybrid", "hybrid_kernels": "kernels/hybrid_kernels"},
    package_data={"": ["py.typed", "*.yaml", "*.cu", "*.cuh", "*.cpp", "*.h"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    zip_safe=False,
)
