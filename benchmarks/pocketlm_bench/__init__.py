"""Measures bundles: quality now; export, memory and devices come with their own benchmarks."""
