r"""How well the embedded world's judges know people's choices, and the exact reward, against what can be known.

    python -m experiments.shapes.measure_judges --preferences data/shapes/people-val \
        --step_aware embedded/step_aware --latent embedded/latent_reward

The first table: how often a judge prefers the picture that people chose, when both have been noised to t with the same
noise. No judge can know more than the exact reward does: of the picture itself, which leaves people's noise; and of the
picture that the base would finish from x_t, which leaves out what the noise has buried.

The second table: the exact reward of pictures for whose every step, from t = 751 on, the judge has chosen the best of
four candidates. It says how far a judge could lead a policy that learns all that it says. Ties are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, UInt8
from rich.console import Console
from rich.table import Table
from torch import Tensor

from callbacks.evaluation.statistics import Mean, by_prompt
from datamodules.prompts import prompt_texts
from datamodules.shapes.drawing import as_unit
from datamodules.shards.pictures import decode_picture
from experiments.cli.command import run_command
from lightning_modules.batches import DenoiserQuery
from lightning_modules.errors import ConfigError
from lightning_modules.files import resolved_path
from lightning_modules.policies import Frozen, StableDiffusion
from lightning_modules.progress import tracked
from lightning_modules.randomness import generator, randn
from lightning_modules.rewards import LatentRewardModel, StepAwarePreferenceModel
from lightning_modules.sampling.step_sampler import SeededDraws, StepSampler
from lightning_modules.sampling.step_scorers import (
    LatentScorer,
    RandomScorer,
    RewardScorer,
    StepAwareScorer,
    StepCandidates,
    StepScorer,
)
from lightning_modules.shapes.reward import ShapesReward

TIMESTEPS = (1, 251, 501, 751, 951)  # of the twenty that the sampler stops at
STEPS, GUIDANCE = 20, 2.5
CLEAN = "as it is"


@dataclass(frozen=True)
class Choices:
    """People's choices between two pictures of a prompt, without ties.

    Attributes:
        pictures: the chosen ones, then the others.
    """

    prompts: list[str]
    pictures: UInt8[Tensor, "two_n 3 H W"]

    @staticmethod
    def read(folder: Path) -> Choices:
        """
        Raises:
            ConfigError: no parquet files, or nothing but ties in them.
        """
        prompts: list[str] = []
        chosen, others = [], []
        for file in sorted(folder.glob("*.parquet")):
            for row in pq.read_table(file, columns=["caption", "jpg_0", "jpg_1", "label_0"]).to_pylist():
                if row["label_0"] != 0.5:
                    pictures = [torch.from_numpy(np.array(decode_picture(row[side]))) for side in ("jpg_0", "jpg_1")]
                    first = row["label_0"] > 0.5
                    prompts.append(row["caption"])
                    chosen.append(pictures[0 if first else 1])
                    others.append(pictures[1 if first else 0])
        if not prompts:
            raise ConfigError(f"--preferences {folder} holds no choices; collect_preferences makes such a folder")
        return Choices(prompts, torch.stack(chosen + others).permute(0, 3, 1, 2))

    def agreement(self, scores: Float[Tensor, " two_n"]) -> float:
        """The share of choices that the scores, ordered as the pictures, side with."""
        chosen, others = scores.chunk(2)
        return (chosen > others).float().mean().item()


def noised(choices: Choices, policy: StableDiffusion, t: int) -> StepCandidates:
    """The pictures at t, both of a choice with the same noise, as a sampler's candidates are shown to a judge."""
    n = len(choices.prompts)
    clean = torch.cat([policy.encode_images(part * 2 - 1) for part in as_unit(choices.pictures).split(256)])
    noise = randn(clean.shape[1:], [generator("measure judges", t, i) for i in range(n)])
    prompts, timesteps = tuple(choices.prompts * 2), torch.full((2 * n,), t)
    latents = policy.schedule.add_noise(clean, noise.repeat(2, 1, 1, 1), timesteps)

    def predict_clean() -> Tensor:
        output = policy.predict_noise(DenoiserQuery(latents, timesteps, policy.encode_prompts(prompts), GUIDANCE))
        return policy.schedule.predict_clean(output, latents, timesteps)[0]

    return StepCandidates(latents, timesteps, timesteps, prompts, torch.zeros(2, n), predict_clean, policy.decode)


def finished(candidates: StepCandidates, policy: StableDiffusion) -> Float[Tensor, "two_n 3 H W"]:
    """What DDIM makes of latents at a timestep where it stops."""
    latents, cond = candidates.latents, policy.encode_prompts(candidates.prompts)
    for step in policy.schedule.trajectory(STEPS, latents.shape[-2] * latents.shape[-1]):
        if step.timestep <= candidates.timesteps[0]:
            start, end = (torch.full((len(latents),), t) for t in (step.timestep, step.next_timestep))
            output = policy.predict_noise(DenoiserQuery(latents, start, cond, GUIDANCE))
            latents = policy.schedule.step(output, latents, start, end, 0.0, None)
    return policy.decode(latents)


@torch.no_grad()
def accuracies(
    choices: Choices, policy: StableDiffusion, judges: Mapping[str, StepScorer]
) -> dict[str, dict[int | str, float]]:
    """Agreement with people by judge and timestep."""
    exact, clean, end = (
        "exact reward",
        "exact reward of the x0-prediction",
        "exact reward of the picture finished from x_t",
    )
    scores = ShapesReward().score(as_unit(choices.pictures), choices.prompts * 2)
    found: dict[str, dict[int | str, float]] = {exact: {CLEAN: choices.agreement(scores)}, end: {}, clean: {}}
    for t in tracked(TIMESTEPS, "accuracy, timestep"):
        candidates = noised(choices, policy, t)
        found[end][t] = choices.agreement(ShapesReward().score(finished(candidates, policy), candidates.prompts))
        found[clean][t] = choices.agreement(ShapesReward().score(candidates.images, candidates.prompts))
        for name, judge in judges.items():
            found.setdefault(name, {})[t] = choices.agreement(judge.score(candidates))
    return found


class Seeing(StepScorer):
    """A judge, and the exact reward of what the last candidates that it has seen look like.

    Attributes:
        rewards: of the last candidates.
    """

    def __init__(self, judge: StepScorer) -> None:
        super().__init__()
        self.judge = judge
        self.rewards = torch.empty(0)

    def score(self, candidates: StepCandidates) -> Float[Tensor, " n"]:
        if not candidates.timesteps.any():  # finished
            self.rewards = ShapesReward().score(candidates.images, candidates.prompts)
        return self.judge.score(candidates)


def reached(policy: StableDiffusion, judge: StepScorer, prompts: Sequence[str], pictures: int) -> Mean:
    """The exact reward of pictures all of whose steps were the judge's best of four."""
    sampler = StepSampler(
        steps=STEPS, guidance_scale=GUIDANCE, threshold=0.0, continuation="best", decode_batch=256, branch_from_step=4
    )
    found: list[tuple[str, float]] = []
    for turn in range(pictures):
        seeing = Seeing(judge)
        rollout = sampler.sample(policy, seeing, prompts, SeededDraws(0, turn, range(len(prompts))))
        best = rollout.comparisons.scores[-len(prompts) :].argmax(dim=1)
        found += zip(prompts, seeing.rewards.reshape(-1, len(prompts)).gather(0, best[None])[0].tolist())
    return Mean.of(list(by_prompt(found).values()))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.shapes.measure_judges",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preferences", type=resolved_path, required=True, help="folder that collect_preferences made")
    parser.add_argument("--step_aware", nargs="+", default=[], metavar="FOLDER", help="SPO's judges")
    parser.add_argument("--latent", nargs="+", default=[], metavar="FOLDER", help="LPO's judges")
    parser.add_argument("--pipeline", default="embedded/shapes", help="whose pictures they judge (%(default)s)")
    parser.add_argument("--prompts", default="embedded/prompts/shapes_validation.txt", help="%(default)s")
    parser.add_argument("--pictures", type=int, default=2, help="per prompt, of the second table (%(default)s)")
    options = parser.parse_args(argv)
    choices = Choices.read(options.preferences)
    policy = StableDiffusion(options.pipeline, Frozen()).eval()
    judges: dict[str, StepScorer] = {
        name: StepAwareScorer(StepAwarePreferenceModel(name, None)) for name in options.step_aware
    }
    for name in options.latent:
        judges[name] = LatentScorer(LatentRewardModel(name, tokenizer=options.pipeline, guidance_scale=GUIDANCE))
    console = Console()
    table = Table(
        "judge",
        CLEAN,
        *(f"t = {t}" for t in TIMESTEPS),
        title=f"agreement with {len(choices.prompts)} choices of people",
    )
    for name, by_time in accuracies(choices, policy, judges).items():
        shown = [f"{by_time[t]:.1%}" if t in by_time else "" for t in (CLEAN, *TIMESTEPS)]
        table.add_row(name, *shown)
    console.print(table)
    led = Table("judge of every step", "exact reward reached", title="the best of four at every step from t = 751 on")
    prompts = prompt_texts(options.prompts)
    others = {"chance": RandomScorer(), "exact reward of the x0-prediction": RewardScorer(ShapesReward())}
    for name, judge in tracked(list((others | judges).items()), "choosing, judge"):
        led.add_row(name, reached(policy, judge, prompts, options.pictures).shown())
    console.print(led)


if __name__ == "__main__":
    run_command(main)
