"""Every reader of files against damaged, mutated and invented ones: it reads them, or says what is wrong; nothing else.

The examples are the same in every run. ``FUZZ_EXAMPLES=5000 python -m pytest tests/test_fuzz_readers.py`` looks longer;
the number is that of each test.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairs_data import picture
from safetensors.torch import save as save_tensors

from callbacks.resume.checkpoint_files import damage_reason, newest_intact_checkpoint
from datamodules.pools.folder import PoolFolder, open_pool, read_manifest
from datamodules.pools.samples import step_pair
from datamodules.preference_pairs import PreferencePairsDataModule
from datamodules.prompts import load_prompts
from datamodules.shards.bad_samples import BadSample, BadSamples
from datamodules.shards.download import Downloads
from datamodules.shards.json_files import parse_json, read_json
from datamodules.shards.locate import open_shards
from datamodules.shards.manifest import MANIFEST, LatentsKey, Manifest
from datamodules.shards.pictures import decode_picture
from datamodules.shards.samples import latent_members, pixel_members, step_members
from datamodules.shards.writer import write_shard
from datamodules.stream.loading import FaultTolerantDataset, PairLoader, identity
from lightning_modules.batches import StepPairs
from lightning_modules.errors import UserError
from lightning_modules.weights.state_dicts import read_state_dict

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # libraries warn of what they mend; that is neither a crash nor an error
    pytest.mark.timeout(max(300, EXAMPLES)),
]
fuzz = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def readable(read: Callable[[], Any]) -> Any:
    """What is read, or None where the reader says in one line why it cannot be."""
    try:
        return read()
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 3000
    return None


# ----------------------------------------------------------------------------------------------- damage

# A damage is (what, where as a fraction of the file, how much, with what); files of any length can have it.
FRACTIONS = st.one_of(st.floats(0, 1, exclude_max=True), st.floats(0, 0.03), st.just(0.0))
DAMAGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "insert", "remove", "copy"]),
        FRACTIONS,
        st.integers(1, 600),
        st.binary(min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=5,
)


def damaged(data: bytes, damages: list[tuple[str, float, int, bytes]]) -> bytes:
    content = bytearray(data)
    for what, fraction, much, bytes_ in damages:
        at = int(fraction * len(content))
        if what == "flip" and content:
            content[at] ^= 1 << much % 8
        elif what == "set":
            content[at : at + len(bytes_)] = bytes_
        elif what == "cut":
            del content[at:]
        elif what == "insert":
            content[at:at] = bytes_
        elif what == "remove":
            del content[at : at + much]
        elif what == "copy":
            content[at:at] = content[at : at + much]
    return bytes(content)


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 10**7),
        st.sampled_from([10**30, -(10**30), 1e308, 1e400, float("nan"), 2**63, 0.5]),
        st.text(max_size=5),
        st.sampled_from(["..", "00000.tar", "../00000.tar", "\0", "\ud800", "000000000", "latents", "x" * 300]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in inner for place in places(child, (*path, key)))]


def altered(value: Any, where: float, new: Any, remove: bool) -> Any:
    """A JSON value with one of its places replaced, or removed."""
    value = json.loads(json.dumps(value))
    found = places(value)
    path = found[int(where * len(found))]
    if not path:
        return new
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    if remove:
        del parent[path[-1]]
    else:
        parent[path[-1]] = new
    return value


# ----------------------------------------------------------------------------------------------- shards

KINDS = ("pixels", "latents", "steps")
KEY = LatentsKey("hash", 8, "centre", "float16")


@cache
def samples(kind: str) -> list[tuple[int, dict[str, bytes]]]:
    numbers = torch.Generator().manual_seed(0)

    def latents(*names: str) -> dict[str, torch.Tensor]:
        return {name: torch.randn(4, 2, 2, generator=numbers).half() for name in names}

    ids = [8.0, 8.0, 0.0, 0.0, 8.0, 8.0]
    if kind == "pixels":
        kinds = [("JPEG", "PNG"), ("WEBP", "PNG"), ("PNG", "JPEG")]
        info = {"caption": "a", "label": 1.0, "num_example_per_prompt": 2}
        return [(n, pixel_members(picture(n, kind=a), picture(n + 9, kind=b), info)) for n, (a, b) in enumerate(kinds)]
    if kind == "latents":
        infos = [{"caption": "a", "embeds_key": "000000000", "chosen_time_ids": ids, "rejected_time_ids": ids}] * 2
        embeds = {"embeds": torch.randn(3, 5, generator=numbers), "pooled": torch.randn(4, generator=numbers)}
        return [
            (n, latent_members(latents("chosen", "rejected"), None if n else embeds, info))
            for n, info in enumerate(infos)
        ]
    info = {"caption": "a", "timestep": 5, "prev_timestep": 1, "score_gap": 0.5}
    return [(n, step_members(latents("latents", "chosen", "rejected"), info)) for n in range(2)]


@cache
def shard(kind: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "00000.tar"
        write_shard(path, samples(kind))
        return path.read_bytes()


POOL_SETTINGS = {"sampler": {"steps": 3, "threshold": 0.1, "eta": 1.0, "guidance_scale": 2.0}}
QUANTILES = {f"score_gap/quantile{q}": 0.5 for q in (10, 50, 90, 100)}


def manifest(kind: str, data: bytes) -> dict[str, Any]:
    count = len(samples(kind))
    value = {"format_version": 1, "kind": kind, "job": "", "corrupt": [], "statistics": {}, "settings": {}}
    value["shards"] = [{"file": "00000.tar", "samples": count, "bytes": len(data), "digest": ""}]
    value["counts"] = {"pairs": count}
    value["latents"] = vars(KEY) if kind == "latents" else None
    if kind == "steps":
        value |= {"settings": POOL_SETTINGS, "statistics": QUANTILES, "counts": {"pairs": count, "prompts": 1}}
    return value


def read_folder(kind: str, data: bytes, described: bytes | None) -> int:
    """Read a folder of one shard as a run does; how many samples came through."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "00000.tar").write_bytes(data)
        if described is not None:
            (folder / MANIFEST).write_bytes(described)
        if kind == "steps":
            return readable(lambda: read_pool(folder)) or 0
        source = str(folder if described is not None else folder / "00000.tar")
        return readable(lambda: read_pairs(source)) or 0


def read_pool(folder: Path) -> int:
    read_manifest(folder)
    shards = open_pool(folder)
    pairs = [readable(lambda n=n: step_pair(shards.read(0, n), n)) for n in range(len(shards.shard(0).keys))]
    pairs = [pair for pair in pairs if pair is not None]
    if pairs:
        readable(lambda: batch_of(pairs))
    return len(pairs)


def batch_of(pairs: list[StepPairs]) -> StepPairs:
    """What a loader makes of them."""
    (batch,) = PairLoader(FaultTolerantDataset(pairs), batch_size=len(pairs), collate_fn=identity)
    return batch


def read_pairs(source: str) -> int:
    data = PreferencePairsDataModule(source, 2, resolution=8, max_bad_share=0.9)
    return sum(len(batch) for batch in data.train_dataloader())


def described(kind: str, data: bytes) -> bytes:
    return json.dumps(manifest(kind, data)).encode()


def test_what_is_not_damaged_is_read() -> None:
    for kind in KINDS:
        assert read_folder(kind, shard(kind), described(kind, shard(kind))) == 2
    assert read_folder("pixels", shard("pixels"), None) == 2


def with_checksums(data: bytes) -> bytes:
    """A tar file of which every block that could be a header has the right checksum."""
    content = bytearray(data)
    for at in range(0, len(content) - 511, 512):
        if content[at + 257 : at + 262] == b"ustar":
            content[at + 148 : at + 156] = b" " * 8
            content[at + 148 : at + 156] = f"{sum(content[at : at + 512]):06o}\0 ".encode()
    return bytes(content)


@fuzz
@given(kind=st.sampled_from(KINDS), damages=DAMAGES, repaired=st.booleans(), bare=st.booleans())
def test_damaged_shards(kind: str, damages: list, repaired: bool, bare: bool) -> None:
    data = damaged(shard(kind), damages)
    data = with_checksums(data) if repaired else data
    read_folder(kind, data, None if bare and kind == "pixels" else described(kind, data))


@fuzz
@given(
    kind=st.sampled_from(KINDS), damages=DAMAGES, sample=st.integers(0, 1), member=st.integers(0, 2), swap=st.booleans()
)
def test_samples_with_damaged_members(kind: str, damages: list, sample: int, member: int, swap: bool) -> None:
    """Whole tar files around damaged pictures, tensors and JSON, which a damaged file seldom gets to."""
    changed = [(number, dict(members)) for number, members in samples(kind)]
    members = changed[sample][1]
    names = sorted(members)
    name = names[member % len(names)]
    members[name] = members[names[(member + 1) % len(names)]] if swap else damaged(members[name], damages)
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder) / "00000.tar", changed)
        data = (Path(folder) / "00000.tar").read_bytes()
    read_folder(kind, data, described(kind, data))


@fuzz
@given(kind=st.sampled_from(KINDS), where=st.floats(0, 1, exclude_max=True), new=JSON, remove=st.booleans())
def test_samples_with_altered_information(kind: str, where: float, new: Any, remove: bool) -> None:
    changed = [(number, dict(members)) for number, members in samples(kind)]
    for _, members in changed:
        members["json"] = json.dumps(altered(json.loads(members["json"]), where, new, remove)).encode()
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder) / "00000.tar", changed)
        data = (Path(folder) / "00000.tar").read_bytes()
    read_folder(kind, data, described(kind, data))


DTYPES = [torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]


@fuzz
@given(
    kind=st.sampled_from(KINDS[1:]),
    shape=st.lists(st.integers(0, 3), max_size=4),
    dtype=st.sampled_from([*DTYPES, torch.float8_e4m3fn]),
    name=st.sampled_from(["chosen", "rejected", "latents", "embeds", "pooled", "rejected_latents"]),
    filled=st.sampled_from([0.0, 1e30, float("nan"), float("inf")]),
)
def test_samples_with_other_tensors(kind: str, shape: list, dtype: torch.dtype, name: str, filled: float) -> None:
    changed = [(number, dict(members)) for number, members in samples(kind)]
    tensor = torch.full(shape, filled, dtype=torch.float64)
    if filled.is_integer() or dtype.is_floating_point:
        tensor = tensor.to(dtype)
    plain = {key: torch.zeros(4, 2, 2) for key in ("chosen", "rejected", "latents")} | {"embeds": torch.zeros(3, 5)}
    for member in ("latents.safetensors", "embeds.safetensors", "step.safetensors"):
        if member in changed[1][1] or (kind == "latents" and member == "embeds.safetensors"):
            changed[1][1][member] = save_tensors({**plain, name: tensor})
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder) / "00000.tar", changed)
        data = (Path(folder) / "00000.tar").read_bytes()
    read_folder(kind, data, described(kind, data))


MEMBER_NAMES = st.one_of(
    st.tuples(
        st.sampled_from(["1", "000000001", "2", "a", "", "../1", "/1", "1.2", "9" * 90]),
        st.sampled_from(["json", "chosen.png", "rejected.png", "rejected.webp", "pth", "step.safetensors", "é", ""]),
    ).map(".".join),
    st.text(max_size=120).filter(lambda text: "\0" not in text),
)
TYPES = st.sampled_from([b"0", b"\0", b"1", b"2", b"3", b"5", b"7", b"L", b"S", b"x", b"g", b"Z"])


@fuzz
@given(
    entries=st.lists(st.tuples(MEMBER_NAMES, TYPES, st.binary(max_size=700)), max_size=6),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_tar_files_of_anything(entries: list[tuple[str, bytes, bytes]], form: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, encoding="utf-8", errors="surrogatepass") as tar:
        for name, kind, content in entries:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), name[:20]
            with suppress(ValueError, UnicodeEncodeError):  # a name that the format cannot hold
                tar.addfile(info, io.BytesIO(content))
    read_folder("pixels", out.getvalue(), None)


# -------------------------------------------------------------------------------------------- manifests


@fuzz
@given(
    kind=st.sampled_from(KINDS),
    where=st.floats(0, 1, exclude_max=True),
    new=JSON,
    remove=st.booleans(),
    damages=DAMAGES,
)
def test_altered_and_damaged_manifests(kind: str, where: float, new: Any, remove: bool, damages: list) -> None:
    value = altered(manifest(kind, shard(kind)), where, new, remove)
    text = json.dumps(value).encode()
    read_folder(kind, shard(kind), text)
    read_folder(kind, shard(kind), damaged(described(kind, shard(kind)), damages))


@fuzz
@given(value=JSON, damages=DAMAGES)
def test_any_json(value: Any, damages: list) -> None:
    for text in (json.dumps(value), damaged(json.dumps(value).encode(), damages)):
        try:
            found = parse_json(text)
        except ValueError:
            continue
        json.dumps(found, ensure_ascii=False).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.json"
        path.write_bytes(damaged(json.dumps(value).encode(), damages))
        readable(lambda: read_json(path))


RECORD = {
    "shard": {"file": "00000.tar", "samples": 2, "bytes": 4096, "digest": ""},
    "comparisons": {
        "timesteps": [334, 1],
        "judged_at": [1, 0],
        "scores": [[0.5, 0.25], [0.5, 0.25]],
        "gaps": [0.5, 0.25],
        "valid": [True, True],
        "checked": [False, False],
        "same_choice": [False, False],
        "same_valid": [False, False],
    },
    "unet_evaluations": 9,
    "decodes": 3,
}


@fuzz
@given(where=st.floats(0, 1, exclude_max=True), new=JSON, remove=st.booleans())
def test_altered_records_of_a_pools_chunks(where: float, new: Any, remove: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "00000.json").write_text(json.dumps(RECORD))
        (folder / "00001.json").write_text(json.dumps(altered(RECORD, where, new, remove)))
        readable(lambda: PoolFolder(folder, 2).complete(POOL_SETTINGS))
        if (folder / MANIFEST).exists():
            assert Manifest.read(folder / MANIFEST).kind == "steps"


@fuzz
@given(damages=DAMAGES)
def test_damaged_notes_of_bad_samples(damages: list) -> None:
    finds = [BadSample("a.tar", str(n), "torn") for n in range(3)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bad_samples.jsonl"
        BadSamples("data", "d", 100, 0.5, file).add(finds)
        file.write_bytes(damaged(file.read_bytes(), damages))
        for _ in range(2):
            again = BadSamples("data", "d", 100, 0.5, file)
            again.add(finds)
            assert again.count >= 3


# ---------------------------------------------------------------------------------------------- prompts

PROMPT_FILES = {
    ".txt": b"a cat\n\na dog\n",
    ".json": b'[{"caption": "a cat", "trainset_idx": 7}, "a dog"]',
    ".jsonl": b'{"prompt": "a cat", "category": "x", "index": 3}\n{"prompt": "a dog"}\n',
    ".tsv": b'Prompt\tCategory\tChallenge\na "cat\tAnimals\tBasic\ndog\tAnimals\tBasic\n',
}


@fuzz
@given(
    suffix=st.sampled_from(sorted(PROMPT_FILES)),
    damages=DAMAGES,
    invented=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda t: t.encode("utf-8", "replace"))),
    value=JSON,
)
def test_prompt_files(suffix: str, damages: list, invented: bytes, value: Any) -> None:
    lists = json.dumps([value, {"caption": value, "trainset_idx": value}, {"prompt": value, "category": value}])
    contents = [damaged(PROMPT_FILES[suffix], damages), invented, json.dumps(value).encode(), lists.encode()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"prompts{suffix}"
        for content in contents:
            path.write_bytes(content)
            for prompt in readable(lambda: load_prompts(path)) or []:
                assert prompt.strip().encode()


def test_a_table_with_a_giant_field(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("Prompt\tCategory\n" + "x" * 200_000 + "\ty\n")
    assert readable(lambda: load_prompts(tmp_path / "a.tsv")) is None
    assert readable(lambda: load_prompts(tmp_path)) is None
    (tmp_path / "folder.txt").mkdir()
    assert readable(lambda: load_prompts(tmp_path)) is None
    assert readable(lambda: load_prompts(tmp_path / "folder.txt")) is None


# --------------------------------------------------------------------------------------------- pictures

PICTURES = [picture(3, (21, 13), kind) for kind in ("JPEG", "PNG", "WEBP")]
MAGIC = [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBPVP8 ", b"RIFF\0\0\0\0WEBPVP8X", b"GIF89a", b""]


@fuzz
@given(base=st.sampled_from(PICTURES), damages=DAMAGES, magic=st.sampled_from(MAGIC), tail=st.binary(max_size=300))
def test_pictures(base: bytes, damages: list, magic: bytes, tail: bytes) -> None:
    for data in (damaged(base, damages), magic + tail):
        image = readable(lambda data=data: decode_picture(data))
        assert image is None or image.mode == "RGB"


# ------------------------------------------------------------------------------------------ checkpoints


def saved(content: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, **options)
    return out.getvalue()


WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(3, dtype=torch.float16)}
CHECKPOINT = {"state_dict": WEIGHTS, "loops": {"fit_loop": {"x": [1, 2]}}, "global_step": 3}
WEIGHT_FILES = {
    "zip.bin": saved(WEIGHTS),
    "legacy.bin": saved(WEIGHTS, _use_new_zipfile_serialization=False),
    "plain.safetensors": save_tensors(WEIGHTS),
}


@fuzz
@given(damages=DAMAGES)
def test_damaged_checkpoints_of_runs_fall_back_to_the_one_before(damages: list) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole, other = folder / "step=0000001.ckpt", folder / "step=0000002.ckpt"
        whole.write_bytes(saved(CHECKPOINT))
        os.utime(whole, (1, 1))
        other.write_bytes(damaged(saved(CHECKPOINT), damages))
        found = newest_intact_checkpoint(folder)
        assert found.checkpoint == (other if damage_reason(other) is None else whole)
        # What passes as whole is one.
        assert torch.load(found.checkpoint, weights_only=True)["global_step"] == 3


@fuzz
@given(name=st.sampled_from(sorted(WEIGHT_FILES)), damages=DAMAGES)
def test_damaged_checkpoints_of_preference_models(name: str, damages: list) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(damaged(WEIGHT_FILES[name], damages))
        weights = readable(lambda: read_state_dict(path, "a test"))
        assert weights is None or all(isinstance(key, str) for key in weights)


@pytest.mark.parametrize("name", sorted(WEIGHT_FILES))
def test_weights_that_are_not_damaged_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(WEIGHT_FILES[name])
    found = read_state_dict(tmp_path / name, "a test")
    assert all(torch.equal(found[key], value) for key, value in WEIGHTS.items())


# ------------------------------------------------------------------------------------------- downloads


@settings(fuzz, max_examples=max(5, EXAMPLES // 20))
@given(damages=DAMAGES)
def test_a_remote_shard_is_whole_or_refused(damages: list) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "00000.tar").write_bytes(damaged(shard("pixels"), damages))
        downloads = Downloads(folder / "cache", stall_seconds=30.0, attempts=1)
        found = readable(lambda: open_shards(f"pipe:cat {folder}/00000.tar", downloads))
        kept = [path for path in (folder / "cache").iterdir() if path.suffix != ".lock"]
        assert len(kept) == (0 if found is None else 1)
