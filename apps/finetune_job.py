"""What one finetuning run is about: the method, what it learns from, and where it goes."""

import re
from dataclasses import dataclass
from typing import Literal

from steer.errors import InputError
from steer.pipelines import (
    D3POPipeline,
    DDPOPipeline,
    FilteredPipeline,
    GRPOPipeline,
    PRDPPipeline,
    RewardBackpropPipeline,
)
from steer.pipelines.finetune import FinetuningPipeline

METHODS: dict[str, type[FinetuningPipeline]] = {
    "d3po": D3POPipeline,
    "prdp": PRDPPipeline,
    "ddpo": DDPOPipeline,
    "grpo": GRPOPipeline,
    "filtered": FilteredPipeline,
    "reward-backprop": RewardBackpropPipeline,
}


@dataclass(frozen=True)
class FinetuneJob:
    """What is trained, on what, and where to: the keys beside `options` and those of FinetuneSettings.

    method              a name in METHODS; `options` are the keyword arguments of its class
    reward              that is trained on (of choices, only what evaluations begin with), and
    eval_rewards        others, that judge the held-out prompts as well; the first decides which weights are best
    output_dir          the folder of the run
    model               an embedded model, a folder, or ORGANISATION/NAME
    variant             of the model's weights, such as fp16
    model_config_folder of a model in a single file: a folder of such a model in diffusers' format
    prompts             to learn from: an embedded list, a file, or a data set of the hub; or
    choices             a folder of human choices, for d3po; what its samples were drawn with need not be said again
    eval_prompts        held out, from the same kinds of places as `prompts`
    eval_prompts_count  so many of them, evenly spaced; by default all
    prompt_column, eval_prompt_column  of a table; by default "prompt"
    device              by default the GPU if there is one
    dtype               of the model; by default float32 on the CPU, bfloat16 elsewhere
    """

    method: str
    output_dir: str
    reward: str | None = None
    model: str = "scenes"
    prompts: str | None = None
    choices: str | None = None
    prompt_column: str | None = None
    eval_prompts: str | None = None
    eval_prompt_column: str | None = None
    eval_prompts_count: int | None = None
    eval_rewards: tuple[str, ...] = ()
    device: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    variant: str | None = None
    model_config_folder: str | None = None

    def __post_init__(self) -> None:
        if (self.prompts is None) == (self.choices is None):
            raise InputError("prompts or choices, one of the two, must say what to learn from")
        if self.choices is not None and not hasattr(METHODS[self.method], "train_on_choices"):
            able = [name for name, cls in METHODS.items() if hasattr(cls, "train_on_choices")]
            raise InputError(f"choices are learnt from by {', '.join(able)}, not by {self.method}: give prompts")
        if self.reward is None and self.choices is None:
            raise InputError("reward is missing: say what to train on, `steer rewards` lists names")
        if self.eval_prompts_count is not None and self.eval_prompts_count < 1:
            raise InputError(f"eval_prompts_count must be at least 1, got {self.eval_prompts_count}")
        if self.eval_rewards and self.eval_prompts is None:
            raise InputError("eval_rewards judge images of eval_prompts, and there are none: give them too")
        if self.eval_prompts is not None and not (self.reward or self.eval_rewards):
            raise InputError("eval_prompts need eval_rewards to judge their images: give some")
        terms = {re.sub(r":[-+.0-9e]+$", "", term) for term in re.split(r"\s\+\s|,\s|[()]", self.reward or "")}
        if trained := [one for one in self.eval_rewards if one.strip() in {self.reward, *map(str.strip, terms)}]:
            raise InputError(
                f"eval_rewards hold {trained[0]!r}, which is trained on: a hold-out that is trained on holds nothing "
                "out, take another"
            )
