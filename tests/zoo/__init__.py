"""A zoo of tiny diffusers pipelines, and the capabilities of steer on each of them."""
