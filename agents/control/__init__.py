"""Learning on Gymnasium environments other than text: small MLPs and fixed-length rollouts."""
