"""Adapters of the environment to other libraries."""
