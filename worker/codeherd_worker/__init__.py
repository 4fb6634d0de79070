"""One process, one GPU (or one group of them), one model: takes jobs, generates, stores answers."""
