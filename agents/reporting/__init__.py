"""Scalars, progress bar and figures of a run."""
