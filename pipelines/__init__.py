"""Steering methods, called like diffusers pipelines."""

from steer.pipelines.best_of_n import BestOfNPipeline
from steer.pipelines.finetune_method import FinetuneResult
from steer.pipelines.finetune_settings import FinetuneSettings
from steer.pipelines.fk import FKSteeringPipeline, StepReport
from steer.pipelines.noise_search import NoiseSearchPipeline
from steer.pipelines.output import Cost, Evaluation, Iteration, Start, SteeringOutput
from steer.pipelines.policy import DDPOPipeline, FilteredPipeline, GRPOPipeline
from steer.pipelines.preference import D3POPipeline, PRDPPipeline
from steer.pipelines.reno import ReNOPipeline
from steer.pipelines.reward_backprop import RewardBackpropPipeline
from steer.pipelines.selection import SelectionPipeline

__all__ = [
    "BestOfNPipeline",
    "Cost",
    "D3POPipeline",
    "DDPOPipeline",
    "Evaluation",
    "FKSteeringPipeline",
    "FilteredPipeline",
    "FinetuneResult",
    "FinetuneSettings",
    "GRPOPipeline",
    "Iteration",
    "NoiseSearchPipeline",
    "PRDPPipeline",
    "ReNOPipeline",
    "RewardBackpropPipeline",
    "SelectionPipeline",
    "Start",
    "SteeringOutput",
    "StepReport",
]
