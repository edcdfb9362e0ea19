"""`powerflow prove`: a layout on this machine's CPUs against one process, with a small model of the user's family."""
