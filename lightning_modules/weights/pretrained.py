"""Where published weights come from: a folder, a folder shipped with the package, or the Hugging Face hub.

``Pretrained.load_model`` is how networks are read: every weight comes from the files, or the place is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_modules.errors import ConfigError
from lightning_modules.files import packaged
from lightning_modules.weights.audit import DAMAGED, UNREADABLE, described

T = TypeVar("T")

# The number types' names in configurations, for whatever loads weights.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(network: torch.nn.Module) -> str:
    """The configurations' name of a network's number type, or torch's where they have none."""
    dtype = next(network.parameters()).dtype
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<subfolder>\w[\w./-]*))?")
# One file of each group must be there: what every published component of that kind has.
_COMPONENT_FILES = {
    "tokenizer": (("vocab.json", "tokenizer.json", "vocab.txt"),),
    "scheduler": (("scheduler_config.json",),),
    "processor": (("preprocessor_config.json", "processor_config.json"),),
    "model": (("config.json",), ("*.safetensors", "*.bin")),
}
# Buffers that older versions of transformers stored: 0, 1, 2, ...
_OLD_BUFFERS = ".position_ids"
# model.safetensors, diffusion_pytorch_model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
_SHARD = r"(?:-\d{5}-of-\d{5})?"
_WEIGHTS = re.compile(rf"\w*model{_SHARD}(?:\.(?P<variant>[\w-]+?))?{_SHARD}\.(?:safetensors|bin)")
_LORA_FILE = "pytorch_lora_weights.safetensors"
_SINGLE_FILES = (".safetensors", ".ckpt")


@dataclass(frozen=True)
class Pretrained:
    """A place that holds one model or the components of a pipeline.

    Attributes:
        name: as the user wrote it, for messages.
        location: an existing folder, or a hub id ``organisation/name``.
        local: whether ``location`` is a folder; then the network is never asked.
        subfolder: the part of a hub repository that is meant; "" for all of it.
        revision: branch, tag or commit on the hub; None for the default.
        single_file: a checkpoint that holds the weights of all networks; everything else comes from the location.
    """

    name: str
    location: str
    local: bool
    subfolder: str = ""
    revision: str | None = None
    single_file: Path | None = None

    @staticmethod
    def find(name: str, revision: str | None = None, layout: str | None = None) -> Pretrained:
        """Resolve a name: an existing folder first (seen from the working folder), then a folder inside the
        installed ``experiments`` package (``embedded/shapes``), else a hub id, ``organisation/name`` or
        ``organisation/name/subfolder``. Or a single ``.safetensors`` file in the original layout of Stable Diffusion;
        then ``layout`` is the folder or hub id that its configurations, tokenizers and scheduler come from.

        Raises:
            ConfigError: it is none of these.
        """
        folder = packaged(name)
        if folder.is_dir():
            return Pretrained(name, str(folder), local=True)
        if folder.suffix in _SINGLE_FILES:
            if folder.suffix != ".safetensors" or layout is None or not folder.is_file():
                raise ConfigError(_single_file(name, folder))
            return replace(Pretrained.find(layout), name=name, single_file=folder)
        match = _HUB_ID.fullmatch(name)
        if match is None:
            raise ConfigError(
                f"Pretrained weights: no folder {name!r} below {Path.cwd()} and it is no hub id either; "
                "give an existing folder or a hub id such as 'stable-diffusion-v1-5/stable-diffusion-v1-5'."
            )
        return Pretrained(name, match["repo"], local=False, subfolder=match["subfolder"] or "", revision=revision)

    def component(self, subfolder: str) -> Pretrained:
        """The component of a pipeline that lies in ``subfolder``."""
        return replace(self, subfolder=f"{self.subfolder}/{subfolder}".strip("/"))

    def load(self, read: Callable[..., T], kind: str = "model") -> T:
        """Call a ``from_pretrained``-like reader on this place.

        Args:
            read: takes the location and the keywords ``subfolder``, ``revision``, ``local_files_only``.
            kind: "model", "tokenizer", "scheduler" or "processor": which files a folder must have.

        Raises:
            ConfigError: missing folder or file, unreadable weights, or a hub that does not answer.
        """
        if self.local and not (self.single_file is not None and kind == "model"):
            self._check_files(kind)
        options: dict[str, object] = {"local_files_only": self.local}
        if self.subfolder:
            options["subfolder"] = self.subfolder
        if self.revision is not None:
            options["revision"] = self.revision
        try:
            return read(self.location, **options)
        except UNREADABLE as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"Pretrained weights: {self._described()} {self._fault(error)}. ({reason})") from error

    def load_model(self, model_class: Any, dtype: torch.dtype, variant: str | None = None) -> Any:
        """The network of a diffusers or transformers class, in the given number type.

        Args:
            model_class: has a ``from_pretrained``; a place that holds another class is refused.
            dtype: what the weights become, whatever the files hold.
            variant: the files' variant, such as "fp16". A local folder without it gives its plain files, which is told.

        Raises:
            ConfigError: as ``load``; or weights are missing, unknown, or of other shapes than the configuration says.
        """
        if self.local and self.single_file is None:
            self._check_files("model")
            variant = self._variant(variant)
        by_diffusers = hasattr(model_class, "load_config")
        if by_diffusers:
            found = self.load(model_class.load_config).get("_class_name", model_class.__name__)
            if found != model_class.__name__:
                raise ConfigError(
                    f"Pretrained weights: {self._described()} is of the class {found}, and a {model_class.__name__} is "
                    "wanted; give a base model of the kind that the policy's class names"
                )
        if self.single_file is not None:
            from lightning_modules.weights.single_file import read_single_file  # needs diffusers, as little else here

            return read_single_file(
                model_class,
                self.single_file,
                dtype,
                config=self.location,
                subfolder=self.subfolder,
                local_files_only=self.local,
            )
        options: dict[str, Any] = {"torch_dtype" if by_diffusers else "dtype": dtype}
        if variant is not None:
            options["variant"] = variant
        read = partial(model_class.from_pretrained, output_loading_info=True, ignore_mismatched_sizes=True, **options)
        model, info = self.load(read)
        unknown = [name for name in info["unexpected_keys"] if not name.endswith(_OLD_BUFFERS)]
        difference = described(info["missing_keys"], unknown, [entry[0] for entry in info["mismatched_keys"]])
        if difference is not None:
            raise ConfigError(
                f"Pretrained weights: {self._described()} does not hold the weights of the {model_class.__name__} that "
                f"its configuration describes: {difference}; give complete files as save_pretrained writes them"
            )
        return model

    def _variant(self, asked: str | None) -> str | None:
        """The variant to read of a local folder.

        Raises:
            ConfigError: its weights are there as other variants alone.
        """
        files = (_WEIGHTS.fullmatch(path.name) for path in (Path(self.location) / self.subfolder).iterdir())
        there = {match["variant"] for match in files if match}
        if asked in there or not there:
            return asked
        if None in there:
            rank_zero_info(f"{self._described()} has no variant {asked!r}: its plain files are read")
            return None
        known = ", ".join(sorted(name for name in there if name is not None))
        raise ConfigError(
            f"Pretrained weights: {self._described()} has the variant {known} alone; set the policy's `variant` to it"
        )

    def _fault(self, error: BaseException) -> str:
        """What is wrong and what mends it. Libraries raise an OSError for nearly everything: its causes say more."""
        chain, cause = [error], error.__cause__ or error.__context__
        while cause is not None and cause not in chain:
            chain.append(cause)
            cause = cause.__cause__ or cause.__context__
        if any(isinstance(e, PermissionError) for e in chain):
            return "cannot be read; allow this user to read it"
        if not self.local:
            return (
                "cannot be fetched from the hub; check the name, the network and the `variant` (fp16 where there are "
                "no plain weights), or give a local folder"
            )
        if any(isinstance(e, DAMAGED) for e in chain):
            return "is damaged; download it again"
        return "is incomplete or of another kind; give a complete folder as save_pretrained writes it"

    def _described(self) -> str:
        return f"{self.name!r}" + (f", component {self.subfolder!r}," if self.subfolder else "")

    def _check_files(self, kind: str) -> None:
        folder = Path(self.location) / self.subfolder
        if kind == "model" and (folder / _LORA_FILE).is_file() and not (folder / "config.json").is_file():
            raise ConfigError(
                f"Pretrained weights: {folder} holds LoRA weights and no network; give it as the LoRA adaptation's "
                "`weights` (--model.policy.adaptation.weights)"
            )
        for group in _COMPONENT_FILES[kind]:
            if not any(next(folder.glob(pattern), None) for pattern in group):
                raise ConfigError(
                    f"Pretrained weights: {' or '.join(group)} not found in {folder} (asked for as {self.name!r}); "
                    "give a complete folder as save_pretrained writes it, or a hub id."
                )


def _single_file(name: str, file: Path) -> str:
    if not file.is_file():
        return f"Pretrained weights: no file {name!r} below {Path.cwd()}; give an existing one"
    if file.suffix != ".safetensors":
        return f"Pretrained weights: {name!r} is a single file that may hold code; convert it to .safetensors"
    return (
        f"Pretrained weights: {name!r} is a single file; set the policy's `layout` to a pipeline of the same kind, "
        "such as stable-diffusion-v1-5/stable-diffusion-v1-5, from which configurations, tokenizers and scheduler come"
    )
