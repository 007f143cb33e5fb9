"""Stages 1 and 2 of RLHF: supervised models and reward models."""
