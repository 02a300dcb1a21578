"""Steering methods, called like diffusers pipelines."""

from steer.pipelines.base import Cost, Evaluation, Iteration, Start, SteeringOutput
from steer.pipelines.fk_steering import FKSteeringPipeline, StepReport
from steer.pipelines.reno import NoiseSearchPipeline, ReNOPipeline
from steer.pipelines.selection import BestOfNPipeline, SelectionPipeline
from steer.pipelines.training.config import TrainingConfig
from steer.pipelines.training.d3po_prdp import D3POTrainer, PRDPTrainer
from steer.pipelines.training.ddpo_grpo import DDPOTrainer, FilteredTrainer, GRPOTrainer
from steer.pipelines.training.method import TrainingResult
from steer.pipelines.training.reward_backprop import RewardBackpropTrainer

__all__ = [
    "BestOfNPipeline",
    "Cost",
    "D3POTrainer",
    "DDPOTrainer",
    "Evaluation",
    "FKSteeringPipeline",
    "FilteredTrainer",
    "GRPOTrainer",
    "Iteration",
    "NoiseSearchPipeline",
    "PRDPTrainer",
    "ReNOPipeline",
    "RewardBackpropTrainer",
    "SelectionPipeline",
    "Start",
    "SteeringOutput",
    "StepReport",
    "TrainingConfig",
    "TrainingResult",
]
