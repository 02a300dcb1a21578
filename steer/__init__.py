"""steer: better images from a diffusion model and a reward, without being fooled by the score.

Everything a user needs is imported from here, and loaded at its first use: `import steer` loads neither torch nor
diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from steer.assets import MODELS, TEXT_MODELS
    from steer.audio import AudioReward
    from steer.diffusion.two_prompts import two_prompts
    from steer.diverse import Selection, diverse
    from steer.errors import InputError
    from steer.pipelines.base import Cost, InitialNoise, Iteration, ResamplingInfo, SteeringOutput
    from steer.pipelines.drafts import DraftsPipeline, RenoisePipeline
    from steer.pipelines.fk_steering import FKSteeringPipeline, StepReport
    from steer.pipelines.map_elites import MapElitesPipeline
    from steer.pipelines.racing import RacingPipeline
    from steer.pipelines.reno import NoiseSearchPipeline, ReNOPipeline
    from steer.pipelines.selection import BestOfNPipeline, SelectionPipeline
    from steer.pipelines.settings import (
        BestOfNSettings,
        DraftsSettings,
        FKSettings,
        MapElitesSettings,
        NoiseSearchSettings,
        RacingSettings,
        RenoiseSettings,
        ReNOSettings,
        SelectionSettings,
    )
    from steer.pipelines.text.masked_diffusion import MaskedDiffusionPipeline
    from steer.pipelines.training.config import TrainingConfig
    from steer.pipelines.training.d3po_prdp import (
        BRAInConfig,
        BRAInTrainer,
        D3POConfig,
        D3POTrainer,
        PRDPConfig,
        PRDPTrainer,
    )
    from steer.pipelines.training.ddpo_grpo import (
        DDPOConfig,
        DDPOTrainer,
        FilteredConfig,
        FilteredTrainer,
        GRPOConfig,
        GRPOTrainer,
    )
    from steer.pipelines.training.drakes import DRAKESConfig, DRAKESTrainer
    from steer.pipelines.training.forward import (
        AWMConfig,
        AWMTrainer,
        DPOConfig,
        DPOTrainer,
        NFTConfig,
        NFTTrainer,
        RAMConfig,
        RAMTrainer,
    )
    from steer.pipelines.training.judged import DNOConfig, DNOTrainer, SPOConfig, SPOTrainer
    from steer.pipelines.training.method import TrainingResult
    from steer.pipelines.training.reward_backprop import RewardBackpropConfig, RewardBackpropTrainer
    from steer.pipelines.training.value import ValueConfig, train_value
    from steer.reward import Judge, Reward, RewardError, SequenceReward, with_timeout
    from steer.rewards.judges import HierarchyJudge, Tournament, as_judge
    from steer.rewards.parser import combine, load_judge, load_reward, score, score_components
    from steer.training.lora_layouts import convert_lora
    from steer.training.overoptimization import find_hacking, fit_reward_curve
    from steer.video import VideoReward

_MODULES = {
    "steer.assets": ("MODELS", "TEXT_MODELS"),
    "steer.audio": ("AudioReward",),
    "steer.diffusion.two_prompts": ("two_prompts",),
    "steer.diverse": ("Selection", "diverse"),
    "steer.errors": ("InputError",),
    "steer.pipelines.base": ("Cost", "InitialNoise", "Iteration", "ResamplingInfo", "SteeringOutput"),
    "steer.pipelines.drafts": ("DraftsPipeline", "RenoisePipeline"),
    "steer.pipelines.fk_steering": ("FKSteeringPipeline", "StepReport"),
    "steer.pipelines.map_elites": ("MapElitesPipeline",),
    "steer.pipelines.racing": ("RacingPipeline",),
    "steer.pipelines.reno": ("NoiseSearchPipeline", "ReNOPipeline"),
    "steer.pipelines.selection": ("BestOfNPipeline", "SelectionPipeline"),
    "steer.pipelines.settings": (
        "BestOfNSettings",
        "DraftsSettings",
        "FKSettings",
        "MapElitesSettings",
        "NoiseSearchSettings",
        "RacingSettings",
        "ReNOSettings",
        "RenoiseSettings",
        "SelectionSettings",
    ),
    "steer.pipelines.text.masked_diffusion": ("MaskedDiffusionPipeline",),
    "steer.pipelines.training.config": ("TrainingConfig",),
    "steer.pipelines.training.d3po_prdp": (
        "BRAInConfig",
        "BRAInTrainer",
        "D3POConfig",
        "D3POTrainer",
        "PRDPConfig",
        "PRDPTrainer",
    ),
    "steer.pipelines.training.ddpo_grpo": (
        "DDPOConfig",
        "DDPOTrainer",
        "FilteredConfig",
        "FilteredTrainer",
        "GRPOConfig",
        "GRPOTrainer",
    ),
    "steer.pipelines.training.drakes": ("DRAKESConfig", "DRAKESTrainer"),
    "steer.pipelines.training.forward": (
        "AWMConfig",
        "AWMTrainer",
        "DPOConfig",
        "DPOTrainer",
        "NFTConfig",
        "NFTTrainer",
        "RAMConfig",
        "RAMTrainer",
    ),
    "steer.pipelines.training.judged": ("DNOConfig", "DNOTrainer", "SPOConfig", "SPOTrainer"),
    "steer.pipelines.training.method": ("TrainingResult",),
    "steer.pipelines.training.reward_backprop": ("RewardBackpropConfig", "RewardBackpropTrainer"),
    "steer.pipelines.training.value": ("ValueConfig", "train_value"),
    "steer.reward": ("Judge", "Reward", "RewardError", "SequenceReward", "with_timeout"),
    "steer.rewards.judges": ("HierarchyJudge", "Tournament", "as_judge"),
    "steer.rewards.parser": ("combine", "load_judge", "load_reward", "score", "score_components"),
    "steer.training.lora_layouts": ("convert_lora",),
    "steer.training.overoptimization": ("find_hacking", "fit_reward_curve"),
    "steer.video": ("VideoReward",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = [
    "MODELS",
    "TEXT_MODELS",
    "AWMConfig",
    "AWMTrainer",
    "AudioReward",
    "BRAInConfig",
    "BRAInTrainer",
    "BestOfNPipeline",
    "BestOfNSettings",
    "Cost",
    "D3POConfig",
    "D3POTrainer",
    "DDPOConfig",
    "DDPOTrainer",
    "DNOConfig",
    "DNOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "DRAKESConfig",
    "DRAKESTrainer",
    "DraftsPipeline",
    "DraftsSettings",
    "FKSettings",
    "FKSteeringPipeline",
    "FilteredConfig",
    "FilteredTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "HierarchyJudge",
    "InitialNoise",
    "InputError",
    "Iteration",
    "Judge",
    "MapElitesPipeline",
    "MapElitesSettings",
    "MaskedDiffusionPipeline",
    "NFTConfig",
    "NFTTrainer",
    "NoiseSearchPipeline",
    "NoiseSearchSettings",
    "PRDPConfig",
    "PRDPTrainer",
    "RAMConfig",
    "RAMTrainer",
    "RacingPipeline",
    "RacingSettings",
    "ReNOPipeline",
    "ReNOSettings",
    "RenoisePipeline",
    "RenoiseSettings",
    "ResamplingInfo",
    "Reward",
    "RewardBackpropConfig",
    "RewardBackpropTrainer",
    "RewardError",
    "SPOConfig",
    "SPOTrainer",
    "Selection",
    "SelectionPipeline",
    "SelectionSettings",
    "SequenceReward",
    "SteeringOutput",
    "StepReport",
    "Tournament",
    "TrainingConfig",
    "TrainingResult",
    "ValueConfig",
    "VideoReward",
    "as_judge",
    "combine",
    "convert_lora",
    "diverse",
    "find_hacking",
    "fit_reward_curve",
    "load_judge",
    "load_reward",
    "score",
    "score_components",
    "train_value",
    "two_prompts",
    "with_timeout",
]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'steer' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
