"""AI feedback: pairs drawn by a policy and ordered by a reward model, as parquet in Pick-a-Pic's schema.

    python -m experiments.prepare_feedback --config dpo_tiny --reward ShapesReward --sampler.guidance_scale 3 \\
        --prompts embedded/prompts/shapes_train.txt --pairs 1024 --output data/shapes/feedback
    python -m experiments.prepare_pickapic --input data/shapes/feedback --output data/shapes/feedback-pairs

Each pair is the best and the worst of ``--candidates`` pictures of one prompt. A pair's pictures depend on the seed and
the pair's number alone. Parts are written completely or not at all; the same command again makes the missing ones.
``--workers`` shares the parts out to processes, by default one per GPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from jsonargparse import Namespace

from callbacks.evaluation.pictures import PictureRequest, draw
from callbacks.evaluation.scores import score_rows
from datamodules.pools.fingerprint import fingerprint
from datamodules.prompts import prompt_texts
from experiments.cli.command import run_command
from experiments.cli.compose import import_named
from experiments.cli.configured_policy import load_policy
from experiments.cli.experiment_cli import OneLineParser
from experiments.cli.setting_errors import one_line
from experiments.preparation.parts import MakeRow, write_parts
from experiments.preparation.pickapic_schema import label_of, pair_row
from lightning_modules.errors import ConfigError
from lightning_modules.files import resolved_path
from lightning_modules.folder_lock import locked_folder
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.randomness import derive_seed
from lightning_modules.rewards.base import RewardModel
from lightning_modules.rewards.function import Reward, as_reward_model
from lightning_modules.sampling.eight_bit import eight_bit
from lightning_modules.sampling.pictures import Sampler


def draw_pairs(
    policy: DiffusionPolicy, reward: RewardModel, prompts: Sequence[str], numbers: Sequence[int], settings: Namespace
) -> list[MakeRow]:
    """What makes the rows of the pairs ``numbers``: best and worst of each prompt's candidates, in random order."""
    k = settings.candidates
    texts = [prompts[number % len(prompts)] for number in numbers for _ in range(k)]
    keys = [(settings.seed, "feedback", number, i) for number in numbers for i in range(k)]
    requests = [PictureRequest(text, key) for text, key in zip(texts, keys)]
    images = draw(policy, settings.sampler, policy.predict_noise, requests)
    pictures = eight_bit(images, texts)
    pictures = pictures.reshape(-1, k, *pictures.shape[1:])
    found = score_rows([reward], images, texts, "the policy", "use another reward or policy", parts=False)
    scores = torch.tensor([row[reward.name] for row in found]).reshape(-1, k)
    examples = Counter(prompts[number % len(prompts)] for number in range(settings.pairs))
    rows: list[MakeRow] = []
    for number, candidates, values in zip(numbers, pictures, scores):
        caption = prompts[number % len(prompts)]
        # Where all scores are equal both would be the first picture.
        chosen = [int(values.argmax()), int(values.argmin())] if values.max() > values.min() else [0, 1]
        if derive_seed(settings.seed, "feedback order", number) % 2:
            chosen.reverse()  # so that nothing can be learnt from which picture comes first
        label, made_by = label_of(values[chosen].tolist(), settings.tie), (reward.name, reward.name)
        pair = number, settings.seed, caption, candidates[chosen], label, examples[caption], made_by
        rows.append(partial(pair_row, *pair))
    return rows


@lru_cache(maxsize=1)
def drawn_and_judged_by(words: tuple[str, ...]) -> tuple[Namespace, DiffusionPolicy, RewardModel, tuple[str, ...]]:
    """What the command's words say, once per process: settings, policy and reward on its device, prompts."""
    import_named({}, words)  # so that a reward's short name is known
    parser = _parser()
    with one_line("--reward"):
        settings = parser.instantiate(parser.parse_args(list(words)))
    policy = load_policy(settings.config)
    return settings, policy, as_reward_model(settings.reward).to(policy.device), tuple(prompt_texts(settings.prompts))


def rows_of(numbers: Sequence[int], words: tuple[str, ...]) -> list[MakeRow]:
    """What makes the rows of a batch, in this process or in a worker."""
    settings, policy, reward, prompts = drawn_and_judged_by(words)
    return draw_pairs(policy, reward, prompts, numbers, settings)


def prepare(words: tuple[str, ...], workers: int) -> None:
    """Write the missing parts of the data set.

    Raises:
        ConfigError: a folder that was begun with other settings.
    """
    drawn_and_judged_by.cache_clear()
    settings, policy, reward, prompts = drawn_and_judged_by(words)
    job = {"config": settings.config, "seed": settings.seed, "pairs": settings.pairs, "tie": settings.tie,
           "candidates": settings.candidates, "prompts": derive_seed(*prompts), "sampler": repr(settings.sampler),
           "reward": type(reward).__name__, "reward's weights": fingerprint(reward, frozen_in_full=True),
           "policy's weights": fingerprint(policy, frozen_in_full=True)}  # fmt: skip
    del policy, reward
    if workers > 1:  # each process has its own, one of them on the same device
        drawn_and_judged_by.cache_clear()
        load_policy.cache_clear()
    rows = partial(rows_of, words=words)
    write_parts(resolved_path(settings.output), job, settings.pairs, settings.batch_size, rows, workers)


def main(argv: Sequence[str] | None = None) -> None:
    words = tuple(sys.argv[1:] if argv is None else argv)
    import_named({}, words)
    parsed = _parser().parse_args(list(words))
    if parsed.pairs < 1 or parsed.candidates < 2 or parsed.batch_size < 1:
        raise ConfigError("want --pairs of at least 1, --candidates of at least 2 and --batch_size of at least 1")
    if parsed.workers is not None and parsed.workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {parsed.workers}")
    with locked_folder(resolved_path(parsed.output), "wait for it, or name another --output"):
        prepare(words, parsed.workers or max(1, torch.cuda.device_count()))


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m experiments.prepare_feedback", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=str, required=True, help="experiment whose policy draws, as for run")
    parser.add_argument("--prompts", type=str, required=True, help="prompt file of any kind that run reads")
    parser.add_argument("--output", type=str, required=True, help="folder for the parquet files")
    parser.add_argument("--pairs", type=int, default=1024)
    parser.add_argument("--candidates", type=int, default=2, help="pictures that a pair is chosen from")
    parser.add_argument("--tie", type=float, default=0.0, help="scores closer than this make a tie")
    parser.add_argument("--batch_size", type=int, default=16, help="pairs drawn at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int | None, default=None, help="processes; one per GPU where it is not given")
    parser.add_argument(
        "--reward", type=Reward, required=True, help="reward model, or function f(images, prompts) by its dotted name"
    )
    parser.add_class_arguments(Sampler, "sampler")
    return parser


if __name__ == "__main__":
    run_command(main)
