"""Files from strangers: nothing in them is run, nothing leads outside, nothing grows beyond a limit."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from pairs_data import picture, write_shards
from transformers import CLIPTextModel

from datamodules.shards.json_files import parse_json
from datamodules.shards.locate import open_shards
from datamodules.shards.manifest import Manifest
from datamodules.shards.pictures import decode_picture
from datamodules.shards.reader import IndexedShard
from datamodules.shards.samples import pixel_members
from datamodules.shards.tar_index import members
from datamodules.shards.writer import write_shard
from experiments.cli.compose import load
from lightning_modules.errors import ConfigError, DataError, UserError
from lightning_modules.rewards.clip import read_tokenizer
from lightning_modules.rewards.step_aware import StepAwarePreferenceModel
from lightning_modules.weights.pretrained import Pretrained

ROOT = Path(__file__).parent.parent
PACKAGES = ("lightning_modules", "datamodules", "callbacks", "experiments")


def refusal(call: Callable[[], object], kind: type[UserError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


# ----------------------------------------------------------------------------------------------- our code


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Every call in a module, by its dotted name."""
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def keyword(call: ast.Call, name: str) -> object:
    values = [word.value for word in call.keywords if word.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def unsafe(name: str, call: ast.Call) -> bool:
    last = name.rpartition(".")[2]
    if name in ("torch.load", "load_from_checkpoint") or last == "load_from_checkpoint":
        return keyword(call, "weights_only") is not True
    if name in ("np.load", "numpy.load"):
        return keyword(call, "allow_pickle") is not False
    if last == "from_pretrained" and re.match(r"Auto[A-Z]", name):
        return keyword(call, "trust_remote_code") is not False
    forbidden = ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "joblib.load", "os.system", "extractall")
    return name in forbidden or last == "extractall"


def test_no_code_of_ours_loads_pickles_or_runs_what_it_reads() -> None:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    assert len(files) > 50
    found = [
        f"{file}:{call.lineno}: {name}"
        for file in files
        for name, call in calls(ast.parse(file.read_text()))
        if unsafe(name, call)
    ]
    assert found == []
    assert any(name == "torch.load" for file in files for name, _ in calls(ast.parse(file.read_text())))


# ------------------------------------------------------------------------------------------------- shards


def tar_with(path: Path, name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE, **fields: object) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.size, info.type = len(data), kind
        for field, value in fields.items():
            setattr(info, field, value)
        tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    "name",
    [
        "1.pth",
        "1.pt",
        "1.pkl",
        "1.pickle",
        "1.pyd",
        "1.npy",
        "1.json.pickle",
        "/1.json",
        "../1.json",
        "a/1.json",
        "1.json/../x",
    ],
)
def test_members_of_other_kinds_and_places_are_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tar_with(tmp_path / "a.tar", name, pickle.dumps(Bomb(tmp_path / "proof")))
    message = refusal(lambda: open_shards(str(path)))
    assert message.startswith(f"shard {path}: member {name!r} is not a sample")
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"S", b"V"],
)
def test_links_devices_and_folders_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tar_with(tmp_path / "a.tar", "1.json", b"", kind, linkname="/etc/passwd")
    assert "member '1.json" in refusal(lambda: open_shards(str(path)))


def test_a_pickle_in_a_sample_is_damaged_data(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    evil = pickle.dumps(Bomb(proof))
    for member in ("latents", "step"):
        path = tmp_path / f"{member}.tar"
        write_shard(path, [(0, {"json": evil, f"{member}.safetensors": evil})])
        sample = IndexedShard(path).read("000000000")
        assert f"no whole {member}" in refusal(lambda sample=sample, member=member: sample.tensors(member))
        assert "the json member is damaged" in refusal(sample.info)
    assert not proof.exists()


def test_pax_headers_may_neither_rename_nor_resize(tmp_path: Path) -> None:
    for header in ({"path": "../../x"}, {"size": "99999999"}, {"GNU.sparse.name": "x"}):
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            info = tarfile.TarInfo("1.json")
            info.size, info.pax_headers = 2, header
            tar.addfile(info, io.BytesIO(b"{}"))
        assert "a pax header renames or resizes" in refusal(lambda path=path: open_shards(str(path)))


def test_tar_files_of_every_tool_are_read_alike(tmp_path: Path) -> None:
    """Python's formats, with pax headers of other kinds, and tar itself, against tarfile."""
    folder = tmp_path / "files"
    folder.mkdir()
    content = {
        f"{n:09d}.{name}": bytes([n]) * (n * 300) for n in range(3) for name in ("chosen.png", "rejected.png", "json")
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
    paths = []
    for number, form in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        paths.append(tmp_path / f"{number}.tar")
        with tarfile.open(paths[-1], "w", format=form) as tar:
            for name in content:
                info = tarfile.TarInfo(name)
                info.size, info.mtime, info.uname = len(content[name]), 1234.5, "jürgen"
                tar.addfile(info, io.BytesIO(content[name]))
    if shutil.which("tar"):
        paths.append(tmp_path / "tool.tar")
        subprocess.run(["tar", "-cf", paths[-1], "-C", folder, *content], check=True)
    for path in paths:
        with path.open("rb") as file, tarfile.open(path) as tar:
            expected = [(info.name, info.offset_data, info.size) for info in tar]
            assert [(m.name, m.offset, m.size) for m in members(file.fileno())] == expected
        assert IndexedShard(path).read("000000002").members["json"] == content["000000002.json"]


def test_two_tar_files_in_one_are_not_half_read_in_silence(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", [1, 1])
    both = tmp_path / "both.tar"
    both.write_bytes((folder / "00000.tar").read_bytes() + (folder / "00001.tar").read_bytes())
    assert "something follows the tar file's end" in refusal(lambda: open_shards(str(both)))


def test_a_header_that_leads_backwards_ends_the_reading(tmp_path: Path) -> None:
    """Python's tarfile walks such a file for ever (CVE-2025-8194)."""
    path = tar_with(tmp_path / "a.tar", "1.json")
    header = bytearray(path.read_bytes())
    header[124:136] = b"-0000002000\0"
    header[148:156] = b"        "
    header[148:156] = f"{sum(header[:512]):06o}\0 ".encode()
    path.write_bytes(header)
    assert "member '1.json' has no size" in refusal(lambda: open_shards(str(path)))


# ------------------------------------------------------------------------------------------------- limits


def test_a_member_beyond_its_limit_is_never_read(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    write_shard(path, [(0, pixel_members(picture(0), picture(1), {"caption": "x" * 1_100_000}))])
    message = refusal(lambda: IndexedShard(path).read("000000000"))
    assert "sample 000000000: json has 11000" in message
    assert "more than 1048576" in message


def png(width: int, height: int) -> bytes:
    """The beginning of a picture that says it is so large."""
    data = bytearray(picture(0))
    data[16:24] = struct.pack(">II", width, height)
    return bytes(data)


def webp(kind: bytes, body: bytes) -> bytes:
    return (
        b"RIFF" + struct.pack("<I", len(body) + 12) + b"WEBP" + kind + struct.pack("<I", len(body)) + body + bytes(16)
    )


LOSSY = b"\x00\x00\x00\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383)
LOSSLESS = b"\x2f" + struct.pack("<I", 16383 | 16383 << 14)
CANVAS = bytes(4) + (2**24 - 1).to_bytes(3, "little") + (2**24 - 1).to_bytes(3, "little")


@pytest.mark.parametrize(
    "data",
    [
        png(2**31 - 1, 2**31 - 1),
        png(10**6, 10**3),
        webp(b"VP8 ", LOSSY),
        webp(b"VP8L", LOSSLESS),
        webp(b"VP8X", CANVAS),
    ],
)
def test_a_picture_bomb_is_refused_from_its_header(data: bytes) -> None:
    message = refusal(lambda: decode_picture(data))
    assert "px is larger than" in message or "DecompressionBomb" in message or "a damaged picture" in message


def test_sizes_in_webp_headers_are_read_as_pillow_reads_them() -> None:
    from PIL import Image

    from datamodules.shards.pictures import _webp_size

    for options in ({"lossless": True}, {"quality": 60}, {"lossless": True, "exif": b"Exif\0\0x"}):
        out = io.BytesIO()
        Image.new("RGB", (37, 53), (1, 200, 3)).save(out, "WEBP", **options)
        assert _webp_size(out.getvalue()) == (37, 53)
    assert _webp_size(picture(0)) == (0, 0)


def test_a_picture_too_narrow_to_be_resized_is_a_bad_sample(tmp_path: Path) -> None:
    from datamodules.pairs.samples import PairTransform

    with pytest.raises(DataError, match="a picture of 60000x1 px is too narrow to be resized to 64 px"):
        PairTransform(64)(decode_picture(picture(0, (60_000, 1))), decode_picture(picture(0)), None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[NaN]", "NaN is no JSON number"),
        ('{"a": -Infinity}', "-Infinity is no JSON number"),
        ("9" * 5000, "digits"),
        ('"\\ud800"', "surrogates not allowed"),
        (b'"\xff"', "utf-8"),
    ],
)
def test_json_that_is_none_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "anything"},
        {"kind": "latents"},
        {"shards": [{"file": "00000.tar", "samples": 10**12, "bytes": 10**6}]},
        {"shards": [{"file": "00000.tar", "samples": -1, "bytes": 10**6}]},
        {"shards": [{"file": "a/../../x.tar", "samples": 1, "bytes": 10**6}]},
        {"shards": [{"file": "..", "samples": 1, "bytes": 10**6}]},
        {"shards": [{"file": 7, "samples": 1, "bytes": 10**6}]},
        {"shards": "none"},
        {"counts": {"pairs": "many"}},
    ],
)
def test_a_manifest_with_what_cannot_be_is_refused(tmp_path: Path, change: dict) -> None:
    folder = write_shards(tmp_path / "data", [1])
    value = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(value | change))
    assert "not a shard manifest" in refusal(lambda: Manifest.read(folder / "manifest.json"))


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize(
    ("component", "reader", "weights"),
    [
        ("unet", partial(UNet2DConditionModel.from_pretrained, torch_dtype=torch.float32), "diffusion_pytorch_model"),
        ("vae", partial(AutoencoderKL.from_pretrained, torch_dtype=torch.float32), "diffusion_pytorch_model"),
        ("text_encoder", partial(CLIPTextModel.from_pretrained, dtype=torch.float32), "pytorch_model"),
    ],
)
def test_a_pickle_among_published_weights_is_not_run(
    tmp_path: Path, pipelines: Path, component: str, reader: Callable[..., object], weights: str
) -> None:
    shutil.copytree(pipelines / "tiny-sd15" / component, tmp_path / "base" / component)
    for file in (tmp_path / "base" / component).glob("*.safetensors"):
        file.unlink()
    torch.save({"weight": Bomb(tmp_path / "proof")}, tmp_path / "base" / component / f"{weights}.bin")
    source = Pretrained.find(str(tmp_path / "base")).component(component)
    message = refusal(lambda: source.load(reader), ConfigError)
    assert "is damaged" in message
    assert not (tmp_path / "proof").exists()


def test_a_pickle_as_a_preference_models_checkpoint_is_not_run(tmp_path: Path, pipelines: Path) -> None:
    file = tmp_path / "weights.bin"
    torch.save({"model.logit_scale": Bomb(tmp_path / "proof")}, file)
    spm = str(pipelines / "tiny-spm")
    message = refusal(lambda: StepAwarePreferenceModel(spm, processor=None, checkpoint=str(file)), ConfigError)
    assert f"{file} cannot be read" in message
    assert not (tmp_path / "proof").exists()


def test_code_that_comes_with_a_tokenizer_is_not_run_and_nobody_is_asked(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'proof')!r})\nclass Evil: pass\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    (folder / "vocab.json").write_text("{}")
    refusal(lambda: Pretrained.find(str(folder)).load(read_tokenizer, kind="tokenizer"), ConfigError)
    assert not (tmp_path / "proof").exists()


def test_the_bomb_goes_off_where_pickles_are_loaded(tmp_path: Path) -> None:
    """What the tests above would not see otherwise."""
    code = f"import pickle; pickle.loads({pickle.dumps(Bomb(tmp_path / 'proof'))!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "proof").exists()


def test_aliases_that_stand_for_too_much_are_refused_before_they_are_written_out(tmp_path):
    """Ten times ten times ... a value: 10^9 of them in 300 bytes, and a list that holds itself."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    for text in ("\n".join(lines), "trainer: &a [*a]"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ConfigError, match="its aliases stand for more than 100000 values"):
            load(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("model: &one {beta: 1}\ndata: *one")
    assert load(tmp_path / "config.yaml") == {"model": {"beta": 1}, "data": {"beta": 1}}
