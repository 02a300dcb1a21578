"""Steering methods, called like diffusers pipelines."""

from steer.pipelines.base import Cost, Evaluation, Iteration, Start, SteeringOutput
from steer.pipelines.fk_steering import FKSteeringPipeline, StepReport
from steer.pipelines.reno import NoiseSearchPipeline, ReNOPipeline
from steer.pipelines.selection import BestOfNPipeline, SelectionPipeline
from steer.pipelines.training.config import FinetuneSettings
from steer.pipelines.training.d3po_prdp import D3POPipeline, PRDPPipeline
from steer.pipelines.training.ddpo_grpo import DDPOPipeline, FilteredPipeline, GRPOPipeline
from steer.pipelines.training.method import FinetuneResult
from steer.pipelines.training.reward_backprop import RewardBackpropPipeline

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
