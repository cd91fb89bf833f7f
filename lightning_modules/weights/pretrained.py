"""Where published weights come from: a folder, a folder shipped with the package, or the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from lightning_modules.errors import ConfigError
from lightning_modules.files import packaged
from lightning_modules.weights.audit import UNREADABLE

T = TypeVar("T")

# The number types' names in configurations, for whatever loads weights.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<subfolder>\w[\w./-]*))?")
# One file of each group must be there: what every published component of that kind has.
_COMPONENT_FILES = {
    "tokenizer": (("vocab.json", "tokenizer.json"),),
    "scheduler": (("scheduler_config.json",),),
    "processor": (("preprocessor_config.json", "processor_config.json"),),
    "model": (("config.json",), ("*.safetensors", "*.bin")),
}


@dataclass(frozen=True)
class Pretrained:
    """A place that holds one model or the components of a pipeline.

    Attributes:
        name: as the user wrote it, for messages.
        location: an existing folder, or a hub id ``organisation/name``.
        local: whether ``location`` is a folder; then the network is never asked.
        subfolder: the part of a hub repository that is meant; "" for all of it.
        revision: branch, tag or commit on the hub; None for the default.
    """

    name: str
    location: str
    local: bool
    subfolder: str = ""
    revision: str | None = None

    @staticmethod
    def find(name: str, revision: str | None = None) -> Pretrained:
        """Resolve a name: an existing folder first (seen from the working folder), then a folder inside the
        installed ``experiments`` package (``embedded/shapes``), else a hub id, ``organisation/name`` or
        ``organisation/name/subfolder``.

        Raises:
            ConfigError: it is none of these.
        """
        folder = packaged(name)
        if folder.is_dir():
            return Pretrained(name, str(folder), local=True)
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
        if self.local:
            self._check_files(kind)
        options: dict[str, object] = {"local_files_only": self.local}
        if self.subfolder:
            options["subfolder"] = self.subfolder
        if self.revision is not None:
            options["revision"] = self.revision
        try:
            return read(self.location, **options)
        except UNREADABLE as error:
            where = "is damaged or of another kind" if self.local else "cannot be fetched from the hub"
            remedy = "download it again" if self.local else "check the name and the network, or give a local folder"
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"Pretrained weights: {self._described()} {where}; {remedy}. ({reason})") from error

    def _described(self) -> str:
        return f"{self.name!r}" + (f", component {self.subfolder!r}," if self.subfolder else "")

    def _check_files(self, kind: str) -> None:
        folder = Path(self.location) / self.subfolder
        for group in _COMPONENT_FILES[kind]:
            if not any(next(folder.glob(pattern), None) for pattern in group):
                raise ConfigError(
                    f"Pretrained weights: {' or '.join(group)} not found in {folder} (asked for as {self.name!r}); "
                    "give a complete folder as save_pretrained writes it, or a hub id."
                )
