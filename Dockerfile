# Pretraining on Hopper GPUs, from NVIDIA's PyTorch image: its CUDA 13 compiler, NCCL, MPI and network libraries, Python 3.12.
# PyTorch is the image's own: the environment sees it, and pip is held to its version. 26.03 is the last image of PyTorch 2.11. Its Transformer
# Engine is older than the one that this project needs, so that is compiled here, against the image's PyTorch. The build fails if
# a version does not fit, or if there are two copies of PyTorch.
#
#   docker build -t megatron-hybrid .
#   docker run --rm megatron-hybrid bash examples/pretrain_hybrid_tiny.sh
#   docker run --rm -e HYBRID_EXTRAS=dev megatron-hybrid bash tests/run.sh      # installs the test tools first
#   docker run --rm --gpus all --ipc host --ulimit memlock=-1 -v /data:/data megatron-hybrid \
#       env DATA='/data/olmo_mix/*.npy' RUN_DIR=/data/runs/olmo bash examples/pretrain_hybrid_7b.sh
#   enroot import -o hybrid.sqsh dockerd://megatron-hybrid                       # for CONTAINER=hybrid.sqsh with SLURM
FROM nvcr.io/nvidia/pytorch:26.03-py3

RUN useradd --create-home --uid 10001 trainer && install --directory --owner=trainer /workspace/megatron_hybrid /workspace/bin
USER trainer
WORKDIR /workspace/megatron_hybrid
COPY --chown=trainer . .

# The image's pip holds every package to the versions of its own builds; ours holds only PyTorch and Triton to them.
ENV PIP_CONSTRAINT=""
RUN bash -c 'python docker/check_image.py --constraints constraints.txt > /tmp/constraints && mv /tmp/constraints constraints.txt'
ENV PIP_CONSTRAINT=/workspace/megatron_hybrid/constraints.txt HYBRID_EXTRAS=gpu,tilelang,mpi,wandb
ENV HYBRID_PYTHON=python HYBRID_SYSTEM_SITE_PACKAGES=1 HYBRID_ALLOW_NO_GPU=1
RUN bash -c 'source tools/env.sh'
RUN bash -c 'source tools/env.sh && python docker/check_image.py --extras "$HYBRID_EXTRAS"'
RUN bash -c 'source tools/env.sh && python tools/pretrain.py examples/configs/pretrain_hybrid_7b.yaml --dry-run --world-size 64'

# SLURM's containers start `python` without tools/env.sh.
RUN bash -c 'source tools/env.sh && printf "#!/bin/sh\nexec %s \"\$@\"\n" "$(command -v python)" > /workspace/bin/python && chmod +x /workspace/bin/python'
ENV PATH=/workspace/bin:$PATH
CMD ["bash"]
