"""Preference objectives, one file each: where the networks are asked, and what their answers cost."""

from lightning_modules.objectives.automatic_beta import AutomaticBeta
from lightning_modules.objectives.base import LossOutput, Objective
from lightning_modules.objectives.dmpo import DMPO
from lightning_modules.objectives.dpo import DPO
from lightning_modules.objectives.dspo import DSPO
from lightning_modules.objectives.hinge import Hinge
from lightning_modules.objectives.ipo import IPO
from lightning_modules.objectives.kto import KTO
from lightning_modules.objectives.mapo import MaPO
from lightning_modules.objectives.pairwise import PairwiseObjective
from lightning_modules.objectives.safeguard import Safeguard
from lightning_modules.objectives.sft import SFT
from lightning_modules.objectives.spo import SPO

__all__ = [
    "DMPO", "DPO", "DSPO", "IPO", "KTO", "SFT", "SPO", "AutomaticBeta", "Hinge", "LossOutput", "MaPO", "Objective",
    "PairwiseObjective", "Safeguard",
]  # fmt: skip
