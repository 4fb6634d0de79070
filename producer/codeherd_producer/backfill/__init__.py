"""Fill in what a repository leaves undocumented, and change nothing else."""
