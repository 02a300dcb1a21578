"""A step that leans towards the reward, and what it owes for that (arXiv 2501.05803)."""

from torch import Generator, Tensor

from steer.transition import Gaussian


# DAS (arXiv 2501.05803), the proposal of its sequential Monte Carlo: the best one for p(x_s | x_t) exp(g·x_s).
def draw_guided(kernel: Gaussian, gradient: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """Draws x_s from q = N(mean + τ² g, τ² I) in place of the kernel p = N(mean, τ² I).

    gradient  g (N, …), that of the log-potential with respect to x_t, in nats per unit of the latents
    Returns x_s (N, …) and log p(x_s) − log q(x_s) in nats (N,), summed over the elements. With x_s = mean + τ² g + τ z

        log p − log q = ½ ‖z‖² − ½ ‖z + τ g‖² = −τ g·z − ½ τ² ‖g‖²

    whose mean over z of its exponential is 1. A step without noise (τ = 0) is not moved and owes nothing.
    """
    z, shift = kernel.noise(generator), kernel.std * gradient.float()
    # From z itself: the difference of two densities would lose it among their thousands of nats.
    log_ratio = -(shift * z + 0.5 * shift**2).flatten(1).sum(1)
    return kernel.mean + kernel.std * (shift + z), log_ratio
