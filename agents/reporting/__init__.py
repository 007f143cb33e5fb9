"""Scalars, a progress bar and pictures of a run."""
