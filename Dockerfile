# Pretraining on H100s, from NVIDIA's PyTorch image: its CUDA 13 compiler, NCCL, MPI and network libraries, Python 3.12.
# The packages are those of constraints.txt, in a .venv of their own: what the tests run on. 26.03 is the last image of PyTorch 2.11; its
# Transformer Engine is older than the pin, so it is compiled here, against the pinned torch.
#
#   docker build -t megatron-hybrid .
#   docker run --rm megatron-hybrid bash examples/pretrain_hybrid_tiny.sh
#   docker run --rm megatron-hybrid bash tests/run.sh
#   docker run --rm --gpus all --ipc host --ulimit memlock=-1 -v /data:/data megatron-hybrid \
#       env DATA='/data/olmo_mix/*.npy' RUN_DIR=/data/runs/olmo bash examples/pretrain_hybrid_7b.sh
FROM nvcr.io/nvidia/pytorch:26.03-py3

# The image's pip holds every package to the versions of its own builds.
ENV PIP_CONSTRAINT="" HYBRID_ALLOW_NO_GPU=1 HYBRID_EXTRAS=dev,gpu,tilelang,mpi

RUN useradd --create-home --uid 10001 trainer && install --directory --owner=trainer /workspace/megatron_hybrid
USER trainer
WORKDIR /workspace/megatron_hybrid
COPY --chown=trainer . .

RUN bash -c 'source tools/env.sh'
RUN bash -c 'source tools/env.sh && python -m pytest -q tests/test_packaging.py -k pins'
RUN bash -c 'source tools/env.sh && python tools/pretrain.py examples/configs/pretrain_hybrid_7b.yaml --dry-run --world-size 64'

CMD ["bash"]
