"""Sequential Monte Carlo: particles, potentials, resampling. Knows no diffusion model."""
