# NVIDIA's PyTorch image brings CUDA, torch, Apex and Transformer Engine built for each other; pip must not replace them.
#
#   docker build -t megatron_powerflow .
#   docker run --gpus all --ipc host --ulimit memlock=-1 -v /models:/models -v /runs:/runs megatron_powerflow \
#       torchrun --nproc-per-node 8 -m megatron_powerflow.cli train megatron_powerflow/recipes/qwen25_math_1.5b.yaml \
#       model.hf_path=/models/Qwen2.5-Math-1.5B run.output_dir=/runs/reasoning
FROM nvcr.io/nvidia/pytorch:25.09-py3

WORKDIR /workspace/megatron_powerflow
COPY setup.py constraints.txt pyproject.toml README.md LICENSE ./
COPY megatron_powerflow megatron_powerflow
# The image's own torch, numpy, Transformer Engine and Apex stay: they are pinned as they are found.
RUN pip freeze | grep -iE '^(torch|numpy|transformer[-_]engine|apex|triton)[ =@]' | grep -v ' @ ' > /tmp/image.txt; \
    grep -viE '^(torch|numpy|megatron-core)==' constraints.txt >> /tmp/image.txt && \
    pip install --no-cache-dir -c /tmp/image.txt "megatron-core==0.19.2" -e ".[plot]" && \
    python -c "import apex, torch, transformer_engine.pytorch"
COPY examples examples
COPY tools tools
COPY tests tests
COPY benchmarks benchmarks
COPY docs docs
