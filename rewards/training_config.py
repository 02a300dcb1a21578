"""Settings of the training of rewards on a CLIP. Imports nothing heavy: the command line derives its options."""

from dataclasses import dataclass

from steer.arguments import Settings, argument
from steer.errors import InputError

OF_PAIRS = ("label_smoothing", "label_noise", "center_rewards_coefficient")
# Objective → settings that it does not use.
UNUSED: dict[str, tuple[str, ...]] = {
    "triplet": OF_PAIRS,
    "rating": (*OF_PAIRS, "slope_penalty", "slope"),
    "contrastive": (*OF_PAIRS, "slope_penalty", "slope", "head", "members", "mix_text", "start"),
}


@dataclass(frozen=True)
class RewardTrainingConfig(Settings):
    """Configuration of the training of a reward; published in its reward.json.

    backbone   a CLIP: scenes, ARCHITECTURE/TAG, ORGANISATION/NAME, or a folder
    head       form of the head: similarity, image, pair, or general (preferences that need not be transitive)
    objective  loss: bradley-terry, scaled-bradley-terry, margin, triplet, regression; rating; contrastive (captions)
    train_backbone  train the CLIP too, not only the head
    members    size of the ensemble; each member has its own seed and its own bootstrap sample of the rows
    steps      training steps of each member
    batch_size     rows of a step
    learning_rate  highest learning rate
    margin     gap of --objective triplet, for no other objective; .3 by default
    label_smoothing  label smoothing, 0 to 0.5
    label_noise      assumed share of wrong labels, 0 to 0.5
    center_rewards_coefficient  weight of the penalty that centers each prompt's rewards at 0; for ensembles 0.01 to 0.1
    slope_penalty    weight of a penalty on slopes above --slope, at points between the images of a pair; 10 is usual
    slope            bound on ‖∇r‖ with respect to an image in [0, 1], nats per unit norm
    mix_text         share of the rows whose prompt is mixed with the nearest other one, below 1
    held_out   share of the prompts that accuracy and calibration are measured on
    seed       seed of the split, of the members and of their batches
    start      folder of a reward with the same head and backbone, to train further: ratings first, then preferences
    """

    backbone: str = argument("scenes")
    head: str = argument("pair", choices="steer.rewards.learned:HEADS")
    objective: str = argument("bradley-terry")
    train_backbone: bool = argument(False)
    members: int = argument(1, "[1, inf)")
    steps: int = argument(500, "[1, inf)")
    batch_size: int = argument(64, "[1, inf)")
    learning_rate: float = argument(1e-3, "(0, inf)")
    margin: float | None = argument(None, "(0, inf)")
    label_smoothing: float = argument(0.0, "[0, 0.5)")
    label_noise: float = argument(0.0, "[0, 0.5)")
    center_rewards_coefficient: float = argument(0.0, "[0, inf)")
    slope_penalty: float = argument(0.0, "[0, inf)")
    slope: float = argument(1.0, "[0, inf)")
    mix_text: float = argument(0.0, "[0, 1)")
    held_out: float = argument(0.1, "[0, 1)")
    seed: int = argument(0, "(-inf, inf)")
    start: str | None = argument(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.margin is not None and self.objective != "triplet":
            raise InputError(f"--margin is of --objective triplet alone, got {self.margin}: leave it out")
        if self.slope_penalty and self.head == "general":
            raise InputError("--slope-penalty is for rewards of single images, not for --head general")
        if self.mix_text and self.head == "image":
            raise InputError("--mix-text is for rewards that read the prompt, not for --head image")
        for name in UNUSED.get(self.objective, ()):
            if getattr(self, name) != type(self).field(name).default:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} is not an option of --objective {self.objective}: leave it out")
