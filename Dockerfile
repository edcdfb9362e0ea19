# NVIDIA's PyTorch image brings CUDA, torch, Apex and Transformer Engine built for each other; pip must not replace them.
#
#   docker build -t megatron_powerflow .
#   docker run --gpus all --ipc host --ulimit memlock=-1 --user "$(id -u):$(id -g)" -v /models:/models -v /runs:/runs \
#       megatron_powerflow \
#       torchrun --nproc-per-node 8 -m megatron_powerflow.cli train megatron_powerflow/recipes/qwen25_math_1.5b.yaml \
#       model.hf_path=/models/Qwen2.5-Math-1.5B run.output_dir=/runs/reasoning
FROM nvcr.io/nvidia/pytorch:25.09-py3

WORKDIR /workspace/megatron_powerflow
COPY setup.py constraints.txt pyproject.toml README.md LICENSE ./
COPY megatron_powerflow megatron_powerflow
# The image's own torch, numpy, Transformer Engine, Apex and triton stay: they are pinned as they are found.
RUN python3 -m pip list --format=freeze | grep -iE '^(torch|numpy|transformer[-_]engine[-_a-z0-9]*|apex|triton)==' > /tmp/pins.txt && \
    grep -viE '^(torch|numpy|megatron-core|#)' constraints.txt >> /tmp/pins.txt
# NVIDIA's PIP_CONSTRAINT holds older versions of some of what is pinned here: these pins stand in its place.
RUN env -u PIP_CONSTRAINT python3 -m pip install --no-cache-dir -c /tmp/pins.txt "megatron-core==0.19.2" -e ".[plot]" && \
    python3 -c "import apex, torch, transformer_engine.pytorch"
COPY examples examples
COPY tools tools
COPY tests tests
COPY benchmarks benchmarks
COPY docs docs
# Not root; with `docker run --user "$(id -u):$(id -g)"` files in mounted folders are the caller's own.
RUN useradd --no-log-init --create-home --uid 10001 powerflow && chmod 1777 /home/powerflow && mkdir -m 1777 runs
ENV HOME=/home/powerflow USER=powerflow
USER powerflow
