"""diversity: how much an image adds to the other images of its prompt, a submodular reward of the set.

With x_1 … x_K the images of a prompt in one call, downscaled to 8 × 8 pixels:

    f(S) = log det(I + L_S),   L_ij = exp(−‖x_i − x_j‖² / (2 h² D)),   r_i = f(S) − f(S ∖ i) = −log [(I + L)⁻¹]_ii

f is monotone and submodular. r_i is the marginal gain of an image after all others (SubPO, arXiv 2307.13372): f(S ∖ i)
does not depend on x_i, so a policy gradient with r_i is the gradient of E f(S). Facility location, the criterion of
`steer pick`, is constant if a set covers itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from steer.diverse import pixel_features
from steer.rewards.clip import reward_name
from steer.rewards.inputs import rows_by_prompt, takes_any_images
from steer.rewards.names import option_number

WIDTH = 0.1


class Diversity:
    """Marginal gain of each image in log det(I + L), nats: log 2 if no other is like it, log(1 + 1/K) if all equal.

    width  h, the root mean square difference of pixels 0..1 at which images begin to differ
    Add it to a reward of single images: "scene-soft + diversity:0.3". Differentiable.
    """

    differentiable = True
    compares_images = True

    def __init__(self, *, width: str | float = WIDTH) -> None:
        self._width = option_number("width", width, above=0)
        self.name = reward_name("diversity", width=(str(width), str(WIDTH)))

    @takes_any_images
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        small = pixel_features(images)  # minus a common mean, which does not change distances
        gains = small.new_zeros(len(small))
        for rows in map(torch.tensor, rows_by_prompt(prompts).values()):
            x = small[rows]
            squares = (x[:, None] - x[None]).square().mean(-1)
            plus_one = (-squares / (2 * self._width**2)).exp() + torch.eye(len(x), device=x.device)
            gains = gains.index_put((rows.to(x.device),), -torch.linalg.inv(plus_one).diagonal().log())
        return gains
