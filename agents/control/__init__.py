"""Learning on any other Gymnasium environment: small networks, stretches of steps as rollouts."""
