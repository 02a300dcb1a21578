"""steer: reward steering and finetuning of diffusers pipelines, with guards against reward over-optimisation.

Import everything from here. Each name is loaded at its first use: `import steer` loads neither torch nor diffusers.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# The public names, one per line. Type checkers see them as re-exports; the code below reads the lines.
if TYPE_CHECKING:
    from steer.assets import MODELS as MODELS
    from steer.assets import TEXT_MODELS as TEXT_MODELS
    from steer.audio import AudioReward as AudioReward
    from steer.diffusion.two_prompts import two_prompts as two_prompts
    from steer.diverse import DiverseSelection as DiverseSelection
    from steer.diverse import diverse as diverse
    from steer.errors import InputError as InputError
    from steer.pipelines.base import Cost as Cost
    from steer.pipelines.base import InitialNoise as InitialNoise
    from steer.pipelines.base import Iteration as Iteration
    from steer.pipelines.base import ResamplingInfo as ResamplingInfo
    from steer.pipelines.base import SteeringOutput as SteeringOutput
    from steer.pipelines.disagreement import Disagreement as Disagreement
    from steer.pipelines.drafts import DraftsPipeline as DraftsPipeline
    from steer.pipelines.drafts import RenoisePipeline as RenoisePipeline
    from steer.pipelines.fk_steering import FKSteeringPipeline as FKSteeringPipeline
    from steer.pipelines.fk_steering import StepReport as StepReport
    from steer.pipelines.map_elites import MapElitesPipeline as MapElitesPipeline
    from steer.pipelines.racing import RacingPipeline as RacingPipeline
    from steer.pipelines.reno import NoiseSearchPipeline as NoiseSearchPipeline
    from steer.pipelines.reno import ReNOPipeline as ReNOPipeline
    from steer.pipelines.selection import BestOfNPipeline as BestOfNPipeline
    from steer.pipelines.selection import SelectionPipeline as SelectionPipeline
    from steer.pipelines.settings import BestOfNSettings as BestOfNSettings
    from steer.pipelines.settings import DraftsSettings as DraftsSettings
    from steer.pipelines.settings import FKSettings as FKSettings
    from steer.pipelines.settings import MapElitesSettings as MapElitesSettings
    from steer.pipelines.settings import NoiseSearchSettings as NoiseSearchSettings
    from steer.pipelines.settings import RacingSettings as RacingSettings
    from steer.pipelines.settings import RenoiseSettings as RenoiseSettings
    from steer.pipelines.settings import ReNOSettings as ReNOSettings
    from steer.pipelines.settings import SelectionSettings as SelectionSettings
    from steer.pipelines.settings import ValueConfig as ValueConfig
    from steer.pipelines.text.masked_diffusion import MaskedDiffusionPipeline as MaskedDiffusionPipeline
    from steer.pipelines.training.config import TrainingConfig as TrainingConfig
    from steer.pipelines.training.d3po_prdp import BRAInConfig as BRAInConfig
    from steer.pipelines.training.d3po_prdp import BRAInTrainer as BRAInTrainer
    from steer.pipelines.training.d3po_prdp import D3POConfig as D3POConfig
    from steer.pipelines.training.d3po_prdp import D3POTrainer as D3POTrainer
    from steer.pipelines.training.d3po_prdp import PRDPConfig as PRDPConfig
    from steer.pipelines.training.d3po_prdp import PRDPTrainer as PRDPTrainer
    from steer.pipelines.training.ddpo_grpo import DDPOConfig as DDPOConfig
    from steer.pipelines.training.ddpo_grpo import DDPOTrainer as DDPOTrainer
    from steer.pipelines.training.ddpo_grpo import FilteredConfig as FilteredConfig
    from steer.pipelines.training.ddpo_grpo import FilteredTrainer as FilteredTrainer
    from steer.pipelines.training.ddpo_grpo import GRPOConfig as GRPOConfig
    from steer.pipelines.training.ddpo_grpo import GRPOTrainer as GRPOTrainer
    from steer.pipelines.training.drakes import DRAKESConfig as DRAKESConfig
    from steer.pipelines.training.drakes import DRAKESTrainer as DRAKESTrainer
    from steer.pipelines.training.forward import AWMConfig as AWMConfig
    from steer.pipelines.training.forward import AWMTrainer as AWMTrainer
    from steer.pipelines.training.forward import DPOConfig as DPOConfig
    from steer.pipelines.training.forward import DPOTrainer as DPOTrainer
    from steer.pipelines.training.forward import NFTConfig as NFTConfig
    from steer.pipelines.training.forward import NFTTrainer as NFTTrainer
    from steer.pipelines.training.forward import RAMConfig as RAMConfig
    from steer.pipelines.training.forward import RAMTrainer as RAMTrainer
    from steer.pipelines.training.judged import DNOConfig as DNOConfig
    from steer.pipelines.training.judged import DNOTrainer as DNOTrainer
    from steer.pipelines.training.judged import SPOConfig as SPOConfig
    from steer.pipelines.training.judged import SPOTrainer as SPOTrainer
    from steer.pipelines.training.method import TrainingResult as TrainingResult
    from steer.pipelines.training.reward_backprop import RewardBackpropConfig as RewardBackpropConfig
    from steer.pipelines.training.reward_backprop import RewardBackpropTrainer as RewardBackpropTrainer
    from steer.pipelines.training.value import train_value as train_value
    from steer.reward import Judge as Judge
    from steer.reward import Reward as Reward
    from steer.reward import RewardError as RewardError
    from steer.reward import SequenceReward as SequenceReward
    from steer.reward import with_timeout as with_timeout
    from steer.rewards.judges import HierarchyJudge as HierarchyJudge
    from steer.rewards.judges import Tournament as Tournament
    from steer.rewards.judges import as_judge as as_judge
    from steer.rewards.parser import combine as combine
    from steer.rewards.parser import load_judge as load_judge
    from steer.rewards.parser import load_reward as load_reward
    from steer.rewards.parser import score as score
    from steer.rewards.parser import score_components as score_components
    from steer.training.lora_layouts import convert_lora as convert_lora
    from steer.training.overoptimization import find_hacking as find_hacking
    from steer.training.overoptimization import fit_reward_curve as fit_reward_curve
    from steer.video import VideoReward as VideoReward

_MODULE_OF = {
    alias.name: str(node.module)
    for node in ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
    if isinstance(node, ast.ImportFrom) and str(node.module).startswith("steer.")
    for alias in node.names
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'steer' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
