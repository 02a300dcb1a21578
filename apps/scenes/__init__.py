"""The embedded model: the scenes it is trained on, and its training."""
