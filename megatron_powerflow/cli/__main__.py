"""`python -m megatron_powerflow.cli`, for launchers that start modules: the same as `powerflow`."""

from megatron_powerflow.cli import main

if __name__ == "__main__":
    main()
