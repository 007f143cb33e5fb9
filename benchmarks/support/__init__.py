"""Shared by the benchmarks of speed and memory: models, measurements, and each side of a comparison."""
