"""Embeddings of an experiment's captions, kept on disk, so that training needs no text encoders.

    python -m experiments.encode_prompts --config dpo_flux --output data/text/flux --size_only
    python -m experiments.encode_prompts --config dpo_flux --output data/text/flux
    python -m experiments.run --config dpo_flux --model.policy.text_cache=data/text/flux

Encoded are the captions of the shards that the config names, its prompts for pools, sample grids and win rates, the
negative prompt, and the empty one, which caption dropout trains on; each once. How much room they take is told first.
What the folder holds already is kept: a command that was broken off goes on, and more captions can be added later. The
text encoders alone go to the GPU.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from experiments.cli.command import run_command
from lightning_modules.errors import ConfigError
from lightning_modules.files import resolved_path
from lightning_modules.progress import Work
from lightning_modules.terminal import literal

if TYPE_CHECKING:  # no --help should wait for torch and diffusers
    from lightning_modules.policies.latent_diffusion import LatentDiffusion
    from lightning_modules.policies.text_cache import TextCache

BATCH = 8  # captions a pass
FILE = 64  # captions a file: what a command that is broken off encodes again at most


def main(argv: Sequence[str] | None = None) -> None:
    """Collect, tell the size, encode and keep.

    Raises:
        UserError: a config without a policy of text encoders; missing prompts, shards or weights; no room.
    """
    options = _parser().parse_args(argv)
    captions = _captions(options.config, options.prompts)
    policy = _policy(options.config)
    cache, missing = _look(policy, options.output, captions)
    if options.size_only or not missing:
        return
    with Work("captions", len(missing)) as work:
        for first in range(0, len(missing), FILE):
            part = missing[first : first + FILE]
            cache.add(part, _encoded(policy, part))
            work.advance(len(part))
    Console().print(literal(f"kept; train with --model.policy.text_cache={options.output}"), soft_wrap=True)


def _captions(config: str, more: Sequence[str]) -> list[str]:
    from datamodules.prompts import prompt_texts
    from experiments.cli.run_captions import prompts_of, shard_captions, shards_of

    settings = _settings(config)
    found = dict.fromkeys(prompts_of(settings))
    for file in more:
        found |= dict.fromkeys(prompt_texts(file))
    for names, cache_dir in shards_of(settings):
        found |= dict.fromkeys(shard_captions(names, cache_dir))
    return list(found)


def _settings(config: str) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from experiments.cli.compose import find_config, load

    try:
        found = OmegaConf.to_container(OmegaConf.create(load(find_config(config))), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"config {config}: {' '.join(str(error).split())}") from error
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def _policy(config: str) -> LatentDiffusion:
    """On the CPU, but for its text encoders."""
    from experiments.cli.compose import find_config
    from experiments.cli.configured_policy import build_policy, device_of_this_process, policy_settings, without
    from lightning_modules.policies.latent_diffusion import LatentDiffusion

    settings = without(policy_settings(find_config(config)), "text_cache", "quantisation")
    policy = build_policy(settings, "cpu")
    if not isinstance(policy, LatentDiffusion) or policy.adaptation.trains_text_encoders:
        raise ConfigError(
            f"config {config}: {type(policy).__name__} trains its text encoders, or has none to cache for"
        )
    for name, encoder in policy.encoders().items():
        if name != "vae":
            encoder.to(device_of_this_process())
    return policy


def _look(policy: LatentDiffusion, folder: Path, captions: Sequence[str]) -> tuple[TextCache, list[str]]:
    """The cache, and what it lacks; how much that is, is printed.

    Raises:
        ConfigError: the disk has no room for it.
    """
    from lightning_modules.policies.text_cache import TextCache

    cache = TextCache(folder, policy.text_key())
    missing = cache.missing(captions)
    row = _encoded(policy, [""])
    each = sum(part.numel() * part.element_size() for part in (row.embeds, row.pooled) if part is not None)
    size = each * len(missing)
    told = f"{len(captions):,} captions, {len(captions) - len(missing):,} of them in {folder} already; to be encoded: "
    Console().print(
        literal(f"{told}{len(missing):,} of {each / 1e6:,.3f} MB, {size / 1e9:,.3f} GB in all"), soft_wrap=True
    )
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        raise ConfigError(
            f"--output {folder}: {size / 1e9:,.1f} GB are needed and {free / 1e9:,.1f} GB are free; make room, or give "
            "another folder"
        )
    return cache, missing


def _encoded(policy: LatentDiffusion, captions: Sequence[str]) -> Any:
    from lightning_modules.batches import Conditioning

    parts = [policy.encode_prompts(captions[first : first + BATCH]) for first in range(0, len(captions), BATCH)]
    return Conditioning.cat(parts).to("cpu")


def _parser() -> argparse.ArgumentParser:
    description, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m experiments.encode_prompts",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="CONFIG", help="the experiment: a YAML file or a packaged config")
    add("--output", required=True, type=resolved_path, metavar="FOLDER", help="where the embeddings are kept")
    add("--prompts", nargs="+", default=[], metavar="FILE", help="prompt files besides those that the config names")
    add("--size_only", action="store_true", help="tell how much room they take, and end")
    return parser


if __name__ == "__main__":
    run_command(main)
