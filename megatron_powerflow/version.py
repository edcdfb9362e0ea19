"""Which version of the package is this? Recorded at every start of a run; setup.py reads this file."""

__version__ = "0.2.0"
