"""PowerFlow (arXiv 2603.18363) on Megatron-Core: label-free alignment of a model with its own power distribution.

Importing this package imports neither torch nor megatron; the command line relies on that.
"""

from megatron_powerflow import former_names
from megatron_powerflow.version import __version__ as __version__

former_names.install()
