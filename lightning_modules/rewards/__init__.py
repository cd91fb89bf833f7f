"""Reward models: how good is this picture for this prompt?"""

from lightning_modules.rewards.aesthetic import AestheticPredictor
from lightning_modules.rewards.base import RewardModel
from lightning_modules.rewards.chance import RandomReward
from lightning_modules.rewards.function import FunctionReward, Reward, as_reward_model
from lightning_modules.rewards.latent import LatentRewardModel
from lightning_modules.rewards.pickscore import PickScore
from lightning_modules.rewards.step_aware import StepAwarePreferenceModel

__all__ = [
    "AestheticPredictor",
    "FunctionReward",
    "LatentRewardModel",
    "PickScore",
    "RandomReward",
    "Reward",
    "RewardModel",
    "StepAwarePreferenceModel",
    "as_reward_model",
]
