"""What the code does on a GPU: `python -m benchmarks.cuda`."""
