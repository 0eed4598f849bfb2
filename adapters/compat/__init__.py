"""Other toolkits' names for these losses, so that a recipe changes a prefix and nothing else."""
