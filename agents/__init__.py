"""TorchRL learners for TextGen-v0: `python -m agents --help`."""
