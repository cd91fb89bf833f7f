"""The published sets of prompts, told by their number and hash; their texts are the user's to bring."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field


def prompts_hash(texts: Sequence[str]) -> str:
    """The first 16 digits of the sha256 of ``json.dumps`` of the list: of every text and of their order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PublishedSet:
    """A set of prompts that papers evaluate on or train with.

    Attributes:
        name: what people call it.
        number: of its prompts.
        hash: ``prompts_hash`` of the published file's; None where it is not known here.
        others: hash -> what happened to a copy of it that is in use.
    """

    name: str
    number: int
    hash: str | None
    others: dict[str, str] = field(default_factory=dict)


_T2I_COMPBENCH = {
    "3d_spatial": "3523ffdce889778e",
    "color": "eaaa748907831bb5",
    "complex": "1c6434a2625dff19",
    "non_spatial": "0f51c2ab6c89bce4",
    "numeracy": "04d9410deec40fcb",
    "shape": "9ae5ff8e88c6c031",
    "spatial": "a0169492f2a81ffc",
    "texture": "d3e81dfa97f12395",
}
_HPDV2_STYLES = {
    "anime": "6b38a479cc6f8998",
    "concept-art": "530d057deafcb82c",
    "paintings": "6570d39467e08b24",
    "photo": "92a3c9a0f743f66e",
}
PUBLISHED = {
    "pickapic_validation": PublishedSet("Pick-a-Pic v1 validation_unique", 500, None),
    "pickapic_test": PublishedSet("Pick-a-Pic v1 test_unique", 500, None),
    "papv2": PublishedSet("Diffusion-SDPO's papv2", 487, "e6eb93da8e511b5a"),
    "spo_4k": PublishedSet("SPO's training prompts", 4000, "a66086bf0db45bb0"),
    "partiprompts": PublishedSet(
        "PartiPrompts",
        1632,
        "06daf232d5abeefb",
        {
            "2acb8a66f55ead37": "one prompt has lost its quotation marks to a CSV reader, as Diffusion-SDPO uses it",
            "325da1ae667e0364": "10 prompts have lost their outer spaces",
        },
    ),
    "hpdv2": PublishedSet("HPDv2's benchmark", 3200, "082b1ed36d8a4d2d"),
    **{
        f"hpdv2_{style}": PublishedSet(f"HPDv2's benchmark, {style}", 800, hash)
        for style, hash in _HPDV2_STYLES.items()
    },
    "geneval": PublishedSet("GenEval", 553, "55cc214a81ab0201"),
    **{
        f"t2i_compbench_{kind}": PublishedSet(f"T2I-CompBench {kind}_val", 300, hash)
        for kind, hash in _T2I_COMPBENCH.items()
    },
    "dpg_bench": PublishedSet("DPG-Bench", 1065, "6eeb3aa0a1492330"),
    "image_reward": PublishedSet("ImageReward's benchmark", 100, "36f9d92a0c2a18be"),
}


def recognised(texts: Sequence[str]) -> PublishedSet | None:
    """The published set that these prompts are, exactly or as one of its copies in use."""
    found = prompts_hash(texts)
    return next((known for known in PUBLISHED.values() if found == known.hash or found in known.others), None)


def difference(texts: Sequence[str], known: PublishedSet) -> str | None:
    """What sets these prompts apart from a published set, in one line; None if nothing does, as far as is known."""
    found = prompts_hash(texts)
    if len(texts) != known.number:
        return f"{known.name}: {len(texts):,} prompts, the published set has {known.number:,}"
    if known.hash is None or found == known.hash:
        return None
    reason = f"; {known.others[found]}" if found in known.others else ""
    return f"{known.name}: {len(texts):,} prompts, hash {found} differs from the published {known.hash}{reason}"


def told(texts: Sequence[str]) -> str:
    """Number and hash of some prompts, and which published set they are, in one line."""
    found, known = prompts_hash(texts), recognised(texts)
    if known is None:
        which = "no published set whose hash is known here"
    else:
        which = f"{known.name}, {known.others[found]}" if found in known.others else f"{known.name} as published"
    return f"{len(texts):,} prompts, {len(set(texts)):,} different, hash {found}: {which}"
