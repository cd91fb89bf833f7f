from lightning_modules.objectives.base import LossOutput, Objective
from lightning_modules.objectives.dpo import DPO, IPO, Hinge, PairLoss, Sigmoid
from lightning_modules.objectives.sft import SFT
from lightning_modules.objectives.spo import SPO

__all__ = ["DPO", "IPO", "SFT", "SPO", "Hinge", "LossOutput", "Objective", "PairLoss", "Sigmoid"]
