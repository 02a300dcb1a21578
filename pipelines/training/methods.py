"""The finetuning methods by name."""

from typing import Any

from steer.pipelines.training.d3po_prdp import BRAInTrainer, D3POTrainer, PRDPTrainer
from steer.pipelines.training.ddpo_grpo import DDPOTrainer, FilteredTrainer, GRPOTrainer
from steer.pipelines.training.drakes import DRAKESTrainer
from steer.pipelines.training.forward import AWMTrainer, DPOTrainer, NFTTrainer, RAMTrainer
from steer.pipelines.training.judged import DNOTrainer, SPOTrainer
from steer.pipelines.training.reward_backprop import RewardBackpropTrainer
from steer.pipelines.training.trainer import Trainer

METHODS: dict[str, type[Trainer[Any]]] = {
    "d3po": D3POTrainer,
    "prdp": PRDPTrainer,
    "ddpo": DDPOTrainer,
    "grpo": GRPOTrainer,
    "filtered": FilteredTrainer,
    "reward-backprop": RewardBackpropTrainer,
    "drakes": DRAKESTrainer,
    "nft": NFTTrainer,
    "awm": AWMTrainer,
    "ram": RAMTrainer,
    "dpo": DPOTrainer,
    "brain": BRAInTrainer,
    "spo": SPOTrainer,
    "dno": DNOTrainer,
}
