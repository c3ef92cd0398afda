"""Starting runs: on this machine, and by SLURM."""
