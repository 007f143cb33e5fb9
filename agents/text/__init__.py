"""Learning on TextGen environments: networks that are language models, whole responses as rollouts."""
