"""Preference objectives, one file each: where the networks are asked, and what their answers cost."""

from lightning_modules.objectives.base import LossOutput, Objective
from lightning_modules.objectives.dpo import DPO
from lightning_modules.objectives.hinge import Hinge
from lightning_modules.objectives.ipo import IPO
from lightning_modules.objectives.pairwise import PairwiseObjective
from lightning_modules.objectives.sft import SFT
from lightning_modules.objectives.spo import SPO

__all__ = ["DPO", "IPO", "SFT", "SPO", "Hinge", "LossOutput", "Objective", "PairwiseObjective"]
