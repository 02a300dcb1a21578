"""Training of a denoiser from rewards: rollouts, losses, gradients, guards, checkpoints."""
