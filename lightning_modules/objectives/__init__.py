from lightning_modules.objectives.base import LossOutput, Objective
from lightning_modules.objectives.dpo import DPO, IPO, Hinge, PairLoss, Sigmoid
from lightning_modules.objectives.sft import SFT

__all__ = ["DPO", "IPO", "SFT", "Hinge", "LossOutput", "Objective", "PairLoss", "Sigmoid"]
