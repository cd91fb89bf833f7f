"""``experiments.evaluate`` on the embedded world: what it draws and scores, and that nothing else decides it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from callbacks.evaluation.pictures import PictureRequest, draw, read_pictures
from callbacks.evaluation.statistics import WinCount
from experiments import evaluate
from experiments.evaluation import job as jobs
from experiments.evaluation.begin import labelled
from experiments.evaluation.results import Evaluation
from lightning_modules.errors import ConfigError, DataError, UserError
from lightning_modules.policies.adaptation import Frozen
from lightning_modules.policies.stable_diffusion import StableDiffusion
from lightning_modules.sampling.pictures import Sampler
from lightning_modules.shapes.reward import ShapesReward

PROMPTS = ["two large green triangles on a white background", "one small red circle on a black background"]
BASE = "embedded/shapes"
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fresh():
    """Policies and judges that a command keeps for itself end with it, as its process does."""
    yield
    jobs.forget()


@pytest.fixture
def words(tmp_path):
    """A command that draws 3 pictures for each of 2 prompts in 4 steps, 4 at a time; ``words(steps=3)`` changes it."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def make(*more, output="out", policies=(f"aligned={BASE}",), baseline=f"base={BASE}", **changes):
        tree = {
            "version": 1, "prompts": {"number": 2}, "sampler": {"name": "DDIM", "steps": 4}, "guidance": [2.0],
            "pictures_per_prompt": 3, "batch_size": 4, "rewards": [{"class_path": "ShapesReward"}],
        }  # fmt: skip
        (tmp_path / "protocol.yaml").write_text(yaml.safe_dump(tree | changes))
        places = [f"--protocol={tmp_path / 'protocol.yaml'}", f"--prompts={tmp_path / 'prompts.txt'}"]
        named = [f"--policy={policy}" for policy in policies] + ([f"--baseline={baseline}"] if baseline else [])
        return [*named, *places, f"--output={tmp_path / output}", *more]

    return make


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# What it finds


def test_base_against_itself_ties_in_every_picture(tmp_path, words, capsys):
    found = evaluate.main(words())
    base, aligned = found.drawn
    assert (base.label, base.baseline, aligned.label, aligned.baseline) == ("base", True, "aligned", False)
    assert set(base.scores) == {"shapes", "shapes/correctness", "shapes/look"}
    assert base.scores == aligned.scores
    assert len({score for row in base.scores["shapes"] for score in row}) == 6
    assert Evaluation.read(tmp_path / "out") == found
    win = WinCount.of(aligned.scores["shapes"], base.scores["shapes"])
    assert (win.rate, win.ties, win.wins, win.losses) == (0.5, 6, 0, 0)
    shown = capsys.readouterr().out
    assert "50.0%" in shown
    assert f"page: {tmp_path / 'out' / 'index.html'}" in shown
    for name in ("index.html", "evaluation.csv", "evaluation.md"):
        assert "aligned" in (tmp_path / "out" / name).read_text()


def test_scores_are_those_of_the_saved_files(tmp_path, words):
    found = evaluate.main(words(baseline=None))
    (drawn,) = found.drawn
    for p, prompt in enumerate(PROMPTS):
        for i in range(3):
            picture = pixels(tmp_path / "out" / drawn.picture(p, i))
            assert picture.shape == (3, 32, 32)
            score = ShapesReward().score(picture[None], [prompt]).item()
            assert drawn.scores["shapes"][p][i] == pytest.approx(score, abs=1e-6)


def test_pictures_are_those_of_win_rates_noise(tmp_path, words):
    """The same key as in a run: what ``test`` judged, ``evaluate`` draws again."""
    found = evaluate.main(words(baseline=None, seed=7))
    policy = StableDiffusion(BASE, Frozen()).eval()
    requests = [PictureRequest(PROMPTS[1], (7, "win_rate", 1, 2))]
    image = draw(policy, Sampler(steps=4, guidance_scale=2.0), policy.predict_noise, requests)
    picture = pixels(tmp_path / "out" / found.drawn[0].picture(1, 2))
    assert (picture - image[0]).abs().max() <= 0.51 / 255 + 1e-5


def test_a_sweep_draws_every_guidance_and_the_result_holds_the_protocol(tmp_path, words):
    found = evaluate.main(words("--guidance", "1", "4", baseline=None))
    assert [(drawn.label, drawn.guidance) for drawn in found.drawn] == [("aligned", 1.0), ("aligned", 4.0)]
    assert found.drawn[0].scores != found.drawn[1].scores
    protocol = found.protocol
    assert protocol["name"] == "protocol"
    assert protocol["sampler"] == {"name": "DDIM", "steps": 4, "eta": 0.0}
    assert protocol["guidance"] == [1.0, 4.0]
    assert protocol["prompts"]["number"] == 2
    assert protocol["resolution"] == 32
    assert protocol["rewards"] == [ShapesReward().described()]


# numpy 2 tells diffusers 0.41 of what it does with its tables.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scheduler_of_diffusers_can_be_asked_for(words):
    ddim, euler = ({"name": name, "steps": 4} for name in ("DDIMScheduler", "EulerDiscreteScheduler"))
    ours = evaluate.main(words(baseline=None, output="ours")).drawn[0].scores["shapes"]
    same = evaluate.main(words(baseline=None, output="same", sampler=ddim)).drawn[0].scores["shapes"]
    other = evaluate.main(words(baseline=None, output="other", sampler=euler)).drawn[0].scores["shapes"]
    assert np.abs(np.subtract(ours, same)).max() < 1e-3
    assert np.abs(np.subtract(ours, other)).max() > 1e-3


def test_the_packaged_world_is_complete(tmp_path):
    words = ["--policy", BASE, "--protocol", "shapes", "--limit", "1", "--output", str(tmp_path / "out")]
    found = evaluate.main(words)
    assert found.drawn[0].label == "shapes"
    assert len(found.drawn[0].scores["shapes"][0]) == 4
    assert found.protocol["prompts"]["number"] == 1


def test_pictures_are_laid_out_for_another_evaluator(tmp_path, words):
    """Once: the same command again finds them."""
    for _ in range(2):
        found = evaluate.main(words("--export", "t2i_compbench", baseline=None, pictures_per_prompt=10))
    files = sorted((tmp_path / "out" / "export" / "t2i_compbench").rglob("*.png"))
    assert len(files) == 20
    assert files[0].read_bytes() in {(tmp_path / "out" / found.drawn[0].picture(1, i)).read_bytes() for i in range(10)}


def test_runs_of_one_name_and_policies_without_one(words):
    found = evaluate.main(words(policies=[f"twice={BASE}", f"twice={BASE}"], baseline=BASE))
    assert [(drawn.label, drawn.folder) for drawn in found.drawn] == [
        ("shapes", "pictures/00_shapes/guidance=2"), ("twice", "pictures/01_twice/guidance=2"),
        ("twice", "pictures/02_twice/guidance=2"),
    ]  # fmt: skip
    both = evaluate.main(words("--limit", "1", output="both", policies=[BASE], baseline=BASE))
    assert [drawn.label for drawn in both.drawn] == ["shapes (baseline)", "shapes"]


# What doesn't decide it


def test_interrupted_anywhere_it_ends_in_the_same_bytes(tmp_path, words, monkeypatch):
    evaluate.main(words())
    whole = everything(tmp_path / "out")

    def dies_after(name, calls):
        real = getattr(jobs, name)

        def failing(*arguments):
            nonlocal calls
            calls -= 1
            if calls < 0:
                raise KeyboardInterrupt
            return real(*arguments)

        return failing

    for name, calls in (("write_json", 0), ("write_json", 2)):
        with monkeypatch.context() as patch:
            patch.setattr(jobs, name, dies_after(name, calls))
            with pytest.raises(KeyboardInterrupt):
                evaluate.main(words(output="again"))
    again = tmp_path / "again"
    next((again / "pictures").rglob("00000_01.png")).unlink()
    (again / "pictures" / "00_base" / "guidance=2" / ".x.png-unfinished-00ff").write_bytes(b"")
    next((again / "scores").rglob("*.json")).write_text("{")
    evaluate.main(words(output="again"))
    ended = everything(again)
    left = {path for path in ended if path not in whole}
    assert all("unfinished" in path.name or path.suffix == ".damaged" for path in left)
    assert {path: ended[path] for path in whole} == whole


def test_a_finished_one_loads_nothing(tmp_path, words, monkeypatch):
    evaluate.main(words())
    whole = everything(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "loaded_policy", None)
        patch.setattr(jobs, "loaded_rewards", None)
        evaluate.main(words())
    assert everything(tmp_path / "out") == whole


def test_two_processes_find_what_one_finds(tmp_path, words):
    evaluate.main(words())
    evaluate.main(words("--workers", "2", output="two"))
    assert everything(tmp_path / "two") == everything(tmp_path / "out")
    assert jobs.loaded_rewards.cache_info().currsize == 0


# What policies are


def with_other_weights(folder):
    """The embedded pipeline, its UNet moved: a folder, and the policy."""
    policy = StableDiffusion(BASE, Frozen()).eval()
    g = torch.Generator().manual_seed(1)
    for parameter in policy.unet.parameters():
        parameter.data += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=g)
    shutil.copytree(ROOT / "experiments" / "embedded" / "shapes", folder)
    policy.unet.save_pretrained(folder / "unet")
    return folder


def test_pipelines_and_unets_of_folders(tmp_path, words):
    pipeline = with_other_weights(tmp_path / "pipeline")
    (tmp_path / "part").mkdir()
    shutil.copytree(pipeline / "unet", tmp_path / "part" / "unet")
    sources = [f"whole={pipeline}", f"part={tmp_path / 'part'}", f"unet={pipeline / 'unet'}"]
    whole, part, unet = evaluate.main(words("--base", BASE, policies=sources, baseline=None)).drawn
    assert whole.scores == part.scores == unet.scores
    base = evaluate.main(words(baseline=None, output="base")).drawn[0]
    assert base.scores != whole.scores


# What is refused


def refused(match, *arguments):
    with pytest.raises(UserError, match=match) as caught:
        evaluate.main(*arguments)
    assert "\n" not in str(caught.value)


def test_a_folder_begun_otherwise_is_refused_and_finished_parts_are_kept(tmp_path, words):
    evaluate.main(words())
    whole = everything(tmp_path / "out")
    refused("out was begun with another protocol's sampler .its job.json.; name a new", words(sampler={"steps": 3}))
    refused("begun with another protocol's guidance", words("--guidance", "3"))
    refused("begun with another policies", words(policies=[f"other={BASE}"]))
    refused("begun with another policies", words(baseline=None))
    (tmp_path / "prompts.txt").write_text("\n".join(reversed(PROMPTS)))
    reversed_prompts = [*words(), f"--prompts={tmp_path / 'reversed.txt'}"]
    (tmp_path / "prompts.txt").rename(tmp_path / "reversed.txt")
    refused("begun with another protocol's prompts", reversed_prompts)
    assert everything(tmp_path / "out") == whole


def test_a_policy_whose_files_have_changed_is_another(tmp_path, words):
    pipeline = with_other_weights(tmp_path / "pipeline")
    evaluate.main(words(policies=[f"x={pipeline}"], baseline=None))
    shutil.copytree(ROOT / "experiments" / "embedded" / "shapes" / "unet", pipeline / "unet", dirs_exist_ok=True)
    refused("begun with another policies, or files of theirs", words(policies=[f"x={pipeline}"], baseline=None))


def test_words_that_stand_for_nothing_are_told_before_anything_is_made(tmp_path, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").write_bytes(b"x")
    shutil.copytree(ROOT / "experiments" / "embedded" / "shapes", tmp_path / "headless")
    shutil.rmtree(tmp_path / "headless" / "unet")
    refused(
        "empty: the folder holds no unet, no LoRA weights and no run; give a run's",
        words(policies=[str(tmp_path / "empty")]),
    )
    refused("config.json not found in .*headless.unet", words(policies=[str(tmp_path / "headless")]))
    refused("nowhere: no folder or file below .* and no hub id", words(policies=["nowhere"]))
    refused("weights.bin: a .bin file may hold anything", words(policies=[str(tmp_path / "weights.bin")]))
    refused("another one is called shapes, too; give NAME=embedded/shapes", words(policies=[BASE, BASE]))
    refused("both called base", words(policies=[f"base={BASE}"]))
    refused("wants NAME=POLICY", words(policies=["base="]))
    refused("unet: it is a part of a model, and nothing beside it tells which", words(
        policies=[str(ROOT / "experiments" / "embedded" / "shapes" / "unet")]))  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_unet_of_another_base_is_told_before_weights_are_read(tmp_path, pipelines, words):
    other = ["--base", BASE]
    place = str(pipelines / "tiny-sdxl" / "unet")
    refused("its UNet has .* and the base's has .*; it belongs to another base model", words(*other, policies=[place]))


def test_prompts_that_are_none_or_not_the_ones_meant(tmp_path, words, capsys):
    (tmp_path / "empty.txt").write_text("\n\n")
    refused("empty.txt holds no prompts", words("--prompts", str(tmp_path / "empty.txt")))
    assert not (tmp_path / "out").exists()
    evaluate.main(words("--limit", "1", baseline=None, prompts={"number": 1632, "hash": "06daf232d5abeefb"}))
    evaluate.main(words("--limit", "1", baseline=None, output="b", prompts={"number": 2, "hash": "06daf232d5abeefa"}))
    told = [line for line in capsys.readouterr().err.splitlines() if "is not the set that is meant" in line]
    assert told[0].endswith(
        "prompts.txt is not the set that is meant: PartiPrompts: 2 prompts, the published set has 1,632"
    )
    assert "protocol protocol: 2 prompts, hash" in told[1]
    refused("is of prompts that do not ship; give --prompts FILE", [
        "--policy", BASE, "--protocol", "partiprompts", "--output", str(tmp_path / "c")])  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"version": 2}, "wants version: 1 at its top, got 2"),
        ({"dtypes": 3}, "'dtypes' is no setting .did you mean 'dtype'"),
        ({"rewards": []}, "rewards is missing"),
        ({"rewards": [{"class_path": "NoReward"}]}, "NoReward"),
        ({"rewards": [{"class_path": "ShapesReward"}] * 2}, "different names"),
        ({"rewards": [{"class_path": "PickScore", "init_args": {"pretrained": "/nowhere"}}]}, "nowhere"),
        ({"rewards": [3]}, "a reward is a class_path with its init_args"),
        ({"sampler": {"name": "Euler"}}, "scheduler 'Euler' is not known"),
        ({"sampler": {"name": "DDIM", "stride": 3}}, "a setting of the wrong kind"),
        ({"sampler": {"steps": 0}}, "whole numbers from 1"),
        ({"guidance": [0.5]}, "guidance_scale >= 1"),
        ({"guidance": [2, 2]}, "different numbers"),
        ({"guidance": "x"}, "a setting of the wrong kind"),
        ({"dtype": "int8"}, "dtype is fp32, bf16 or fp16, got 'int8'"),
    ],
)
def test_protocols_without_meaning_are_refused(tmp_path, words, changes, match):
    refused(match, words(**changes))
    assert not (tmp_path / "out" / "pictures").exists()


def test_a_protocol_that_is_not_there_names_those_that_ship(words):
    refused("protocol 'shape' .did you mean 'shapes'.*: no file, and none of hpdv2, partiprompts, pickapic_val", [
        "--policy", BASE, "--protocol", "shape", "--output", "x"])  # fmt: skip


class Fails(ShapesReward):
    """Gives no number for the second batch, or raises."""

    def __init__(self, error: bool = False) -> None:
        super().__init__()
        self.error, self.asked = error, 0

    def score(self, images, prompts):
        self.asked += 1
        if self.asked == 2 and self.error:
            raise UserError("scoring server http://localhost:1 does not answer")
        return torch.full((len(images),), float("nan") if self.asked == 2 else 0.5)


@pytest.mark.parametrize(("error", "match"), [(True, "does not answer"), (False, "reward shapes is nan for a picture")])
def test_a_judge_that_fails_leaves_what_is_finished(tmp_path, words, monkeypatch, error, match):
    monkeypatch.setattr(jobs, "build_rewards", lambda settings: [Fails(error)])
    refused(match, words())
    files = everything(tmp_path / "out")
    assert len([path for path in files if path.suffix == ".png"]) == 6
    assert [path.name for path in files if path.parts[0] == "scores"] == ["00000.json"]
    assert "evaluation.json" not in {path.name for path in files}


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


def test_a_function_of_the_users_judges(words):
    found = evaluate.main(words(baseline=None, rewards=["test_evaluate.brightness", {"class_path": "ShapesReward"}]))
    assert set(found.drawn[0].scores) == {"brightness", "shapes", "shapes/correctness", "shapes/look"}
    assert [reward["name"] for reward in found.protocol["rewards"]] == ["brightness", "shapes"]


def test_names_of_policies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "step=0001").mkdir()
    assert labelled("DPO=runs/dpo") == ("DPO", "runs/dpo")
    assert labelled("runs/x/export/step=0000100") == (None, "runs/x/export/step=0000100")
    assert labelled("step=0001") == (None, "step=0001")
    with pytest.raises(ConfigError, match="wants NAME=POLICY"):
        labelled("x=")
    assert json.dumps(labelled("x=y=z")) == '["x", "y=z"]'


@pytest.mark.parametrize(
    ("damage", "match"),
    [(b"\x89PNG", "picture .*00000_01.png is damaged .*; delete it, and it is drawn again"), (None, "different sizes")],
)
def test_a_picture_that_was_damaged_is_told(tmp_path, damage, match):
    for name in ("00000_00.png", "00000_01.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    if damage is None:
        Image.new("RGB", (8, 9)).save(tmp_path / "00000_01.png")
    else:
        (tmp_path / "00000_01.png").write_bytes(damage)
    with pytest.raises(DataError, match=match):
        read_pictures([tmp_path / "00000_00.png", tmp_path / "00000_01.png"])
