"""PowerFlow (arXiv 2603.18363) on Megatron-Core: label-free alignment of a model with its own power distribution.

Importing this package imports neither torch nor megatron; the command line relies on that.
"""

__version__ = "0.2.0"
