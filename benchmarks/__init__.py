"""Benchmarks: what each loss costs, against its floor and its peers."""
