"""Steering methods, called like diffusers pipelines."""

from steer.pipelines.best_of_n import BestOfNPipeline
from steer.pipelines.fk import FKSteeringPipeline, StepReport
from steer.pipelines.output import Cost, Evaluation, SteeringOutput

__all__ = ["BestOfNPipeline", "Cost", "Evaluation", "FKSteeringPipeline", "SteeringOutput", "StepReport"]
