"""Steering methods, called like diffusers pipelines."""

from steer.pipelines.best_of_n import BestOfNPipeline
from steer.pipelines.fk import FKSteeringPipeline, StepReport
from steer.pipelines.noise_search import NoiseSearchPipeline
from steer.pipelines.output import Cost, Evaluation, Iteration, Start, SteeringOutput
from steer.pipelines.reno import ReNOPipeline

__all__ = [
    "BestOfNPipeline",
    "Cost",
    "Evaluation",
    "FKSteeringPipeline",
    "Iteration",
    "NoiseSearchPipeline",
    "ReNOPipeline",
    "Start",
    "SteeringOutput",
    "StepReport",
]
