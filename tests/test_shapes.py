"""The embedded world's pictures, splits, stream of samples, parquet and pipeline folder."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import lightning as L
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import experiments
from datamodules.shapes.data import ShapesDataModule, ShapesPairs
from datamodules.shapes.drawing import (
    as_unit,
    degrade,
    draw,
    draw_imperfect,
    prompt_splits,
    random_numbers,
    random_prompts,
)
from experiments.shapes import build_pipeline as build_shapes_pipeline
from experiments.shapes import prepare as prepare_shapes
from lightning_modules.errors import ConfigError
from lightning_modules.shapes.reward import ShapesReward
from lightning_modules.shapes.world import SCENES, Scene

EMBEDDED = Path(__file__).parent.parent / "experiments" / "embedded" / "shapes"


def data(**options) -> ShapesDataModule:
    return ShapesDataModule(**{"batch_size": 4, "batches_per_epoch": 3, "size": 20} | options)


def test_splits_are_disjoint_and_whole():
    splits = prompt_splits()
    assert {name: len(prompts) for name, prompts in splits.items()} == {"train": 132, "validation": 36, "test": 48}
    assert sorted(prompt for prompts in splits.values() for prompt in prompts) == sorted(SCENES)


def test_every_word_of_the_held_out_prompts_occurs_in_training():
    words = {name: {word for p in prompts for word in p.split()} for name, prompts in prompt_splits().items()}
    assert words["validation"] | words["test"] <= words["train"]


def test_objects_never_touch():
    scene = Scene(3, "large", "red", "square", "white")
    pictures = [torch.from_numpy(np.array(draw(scene, random_numbers(0, i)))).permute(2, 0, 1) for i in range(50)]
    parts = ShapesReward().parts(as_unit(torch.stack(pictures)), [scene.caption] * 50)
    assert parts["correctness"].min() > 0.9  # merged or cut objects would not be three


def test_degrading_by_nothing_changes_nothing_and_more_costs_more():
    caption = "two large green triangles on a white background"
    clean = draw(Scene.parse(caption), random_numbers(0))
    untouched = degrade(clean, random_numbers(1), strength=0.0)
    assert torch.equal(untouched, torch.from_numpy(np.array(clean)).permute(2, 0, 1))
    looks = [
        ShapesReward().parts(
            as_unit(torch.stack([degrade(clean, random_numbers(1, i), strength) for i in range(40)])), [caption] * 40
        )["look"]
        for strength in (0.3, 1.0)
    ]
    assert looks[0].mean() > looks[1].mean() + 0.1


def test_imperfect_pictures_are_between_wrong_and_clean():
    pairs = ShapesPairs(random_prompts("train", 300, seed=3), seed=3, ranked=False)
    parts = ShapesReward().parts(as_unit(pairs.pictures[:, 0]), pairs.prompts)
    score = parts["correctness"] * parts["look"]
    assert 0.3 < score.mean() < 0.7
    assert score.std() > 0.15  # pairs must differ to be preferred
    assert (parts["correctness"] < 0.2).float().mean() < 0.25  # the content is rarely wrong


def test_a_drawing_is_a_function_of_its_key():
    scene = Scene.parse("one small red circle on a black background")
    one, same, other = (draw_imperfect(scene, random_numbers(7, k)) for k in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_ranked_pairs_are_the_same_pairs_with_the_better_picture_first():
    drawn, ranked = (ShapesPairs(random_prompts("train", 60, seed=0), seed=0, ranked=r) for r in (False, True))
    scores = [[ShapesReward().score(as_unit(p.pictures[:, k]), p.prompts) for k in (0, 1)] for p in (drawn, ranked)]
    assert drawn.prompts == ranked.prompts
    assert (scores[1][0] >= scores[1][1]).all()
    assert (scores[0][0] < scores[0][1]).any()
    torch.testing.assert_close(scores[0][0] + scores[0][1], scores[1][0] + scores[1][1])


def test_sample_n_does_not_depend_on_batch_size_or_rank():
    whole = data(batch_size=12).train_batch(1)
    small = [data(batch_size=3).train_batch(m) for m in (4, 5, 6, 7)]
    ranks = [data(batch_size=3).train_batch(m, rank, 2) for m in (2, 3) for rank in (0, 1)]
    for parts in (small, ranks):
        assert torch.equal(whole.indices, torch.cat([part.indices for part in parts]))
        assert torch.equal(whole.chosen, torch.cat([part.chosen for part in parts]))
        assert torch.equal(whole.rejected, torch.cat([part.rejected for part in parts]))
        assert whole.prompts == tuple(prompt for part in parts for prompt in part.prompts)


def test_batches_are_preference_pairs_in_range():
    batch = data().train_batch(0)
    assert batch.chosen.shape == batch.rejected.shape == (4, 3, 32, 32)
    assert batch.chosen.min() >= -1
    assert batch.chosen.max() <= 1
    assert batch.chosen_time_ids.tolist() == [[32, 32, 0, 0, 32, 32]] * 4
    assert set(batch.prompts) <= set(prompt_splits()["train"])


def test_an_epoch_of_samples_uses_every_pair_once_and_the_next_in_another_order():
    module = data()
    epochs = [[module.sample_row(n) for n in range(start, start + 20)] for start in (0, 20)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]


class Seen(L.LightningModule):
    """Records what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.indices: list[int] = []

    def training_step(self, batch, batch_index):
        self.indices += batch.indices.tolist()
        return self.weight.square().sum()

    def validation_step(self, batch, batch_index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_training_walks_through_the_samples_over_epochs_and_after_a_resume(tmp_path: Path):
    def trainer(steps: int) -> L.Trainer:
        return L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            default_root_dir=tmp_path,
        )

    first, second = Seen(), Seen()
    start = trainer(4)  # into the second epoch of 3 batches
    start.fit(first, data())
    assert first.indices == list(range(16))
    start.save_checkpoint(tmp_path / "half.ckpt")
    trainer(7).fit(second, data(), ckpt_path=tmp_path / "half.ckpt")
    assert second.indices == list(range(16, 28))


def test_validation_shows_the_validation_prompts_the_same_every_time():
    batches = [list(data().val_dataloader()) for _ in range(2)]
    assert len(data().val_dataloader()) == len(batches[0])
    prompts = [prompt for batch in batches[0] for prompt in batch.prompts]
    assert prompts == list(prompt_splits()["validation"]) * 4
    assert all(torch.equal(a.chosen, b.chosen) for a, b in zip(*batches))


@pytest.mark.parametrize("option", ["batch_size", "batches_per_epoch", "size"])
def test_nothing_to_draw_is_refused(option: str):
    with pytest.raises(ConfigError, match=f"data.{option} must be at least 1, got 0"):
        data(**{option: 0})


# Parquet


def test_drawn_parquet_has_pickapic_rows_whose_labels_follow_the_reward(tmp_path: Path):
    prepare_shapes.main(["--output", str(tmp_path / "pairs"), "--pairs", "60", "--seed", "1"])
    (file,) = (tmp_path / "pairs").iterdir()
    table = pq.read_table(file)
    assert table.schema.equals(prepare_shapes.SCHEMA)
    rows = table.to_pylist()
    assert len(rows) == 60
    assert {row["caption"] for row in rows} <= set(prompt_splits()["train"])
    for row in rows:
        pictures = [np.asarray(Image.open(io.BytesIO(row[f"jpg_{k}"]))) for k in (0, 1)]
        both = torch.stack([torch.from_numpy(picture.copy()).permute(2, 0, 1) for picture in pictures])
        first, second = ShapesReward().score(as_unit(both), [row["caption"]] * 2).tolist()
        expected = 0.5 if abs(first - second) < prepare_shapes.TIE else float(first > second)
        assert (row["label_0"], row["label_1"]) == (expected, 1 - expected)
        best = "tie" if expected == 0.5 else row["image_0_uid" if expected == 1 else "image_1_uid"]
        assert row["best_image_uid"] == best
        assert row["are_different"] == (expected != 0.5)
        assert row["num_example_per_prompt"] == sum(other["caption"] == row["caption"] for other in rows)
    assert len({row[f"image_{k}_uid"] for row in rows for k in (0, 1)}) == 120


def test_parquet_never_overwrites_and_leaves_nothing_half_written(tmp_path: Path):
    with pytest.raises(ConfigError, match="exists already"):
        prepare_shapes.prepare(tmp_path, pairs=1, seed=0)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        prepare_shapes.prepare(tmp_path / "none", pairs=0, seed=0)
    assert list(tmp_path.iterdir()) == []


# The pipeline folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "shapes"
    build_shapes_pipeline.main(["--output", str(folder)])
    return folder


def test_every_word_is_one_token(built: Path):
    tokenizer = StableDiffusionPipeline.from_pretrained(built).tokenizer
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    for caption in SCENES:
        tokens = tokenizer(caption).input_ids
        assert (tokens[0], len(tokens), tokens[-1]) == (start, len(caption.split()) + 2, end)
    ids = {word: tokenizer(word).input_ids[1:-1] for word in build_shapes_pipeline.words()}
    assert all(len(tokens) == 1 for tokens in ids.values())
    assert len({tokens[0] for tokens in ids.values()}) == len(ids)
    assert len(tokenizer("a purple hexagon").input_ids) > 5  # unknown words are spelled


def test_random_weights_are_a_function_of_the_seed(built: Path, tmp_path: Path):
    build_shapes_pipeline.main(["--output", str(tmp_path / "again")])
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (built / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()


def test_trained_parts_are_assembled(built: Path, tmp_path: Path):
    build_shapes_pipeline.main(["--output", str(tmp_path / "trained"), "--trained", str(built)])
    pipelines = [StableDiffusionPipeline.from_pretrained(f) for f in (built, tmp_path / "trained")]
    for name in ("unet", "vae", "text_encoder"):
        random, trained = (getattr(pipeline, name).state_dict() for pipeline in pipelines)
        assert all(torch.equal(random[key].half(), trained[key].half()) for key in random)
    with pytest.raises(ConfigError, match="no trained vae in"):
        build_shapes_pipeline.main(["--output", str(tmp_path / "other"), "--trained", str(tmp_path)])
    assert not (tmp_path / "other").exists()


def test_networks_named_untrained_keep_their_random_weights(built: Path, tmp_path: Path):
    words = ["--trained", "embedded/shapes", "--untrained", "unet", "text_encoder"]
    build_shapes_pipeline.main(["--output", str(tmp_path / "start"), *words])
    start = StableDiffusionPipeline.from_pretrained(tmp_path / "start")
    shipped = AutoencoderKL.from_pretrained(Path(experiments.__file__).parent / "embedded" / "shapes" / "vae")
    assert all(torch.equal(value, shipped.state_dict()[key]) for key, value in start.vae.state_dict().items())
    for name, file in (("unet", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        assert (built / name / file).read_bytes() == (tmp_path / "start" / name / file).read_bytes()


def test_a_trained_part_without_some_weights_is_refused(built: Path, tmp_path: Path):
    shutil.copytree(built, tmp_path / "short")
    file = tmp_path / "short" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "conv_in.bias"}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"does not hold the weights of the UNet2DConditionModel.*conv_in\.bias"):
        build_shapes_pipeline.main(["--output", str(tmp_path / "new"), "--trained", str(tmp_path / "short")])
    assert not (tmp_path / "new").exists()


def test_a_pipeline_folder_is_never_overwritten(built: Path):
    with pytest.raises(ConfigError, match="exists already"):
        build_shapes_pipeline.main(["--output", str(built)])


def test_the_shipped_pipeline_is_small():
    assert sum(file.stat().st_size for file in EMBEDDED.rglob("*") if file.is_file()) <= 8_000_000


def test_the_shipped_pipeline_draws_held_out_prompts_in_plain_diffusers():
    pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED)
    pipeline.set_progress_bar_config(disable=True)
    prompts = list(prompt_splits()["test"][:12])
    generator = torch.Generator().manual_seed(0)
    images = pipeline(prompts, num_inference_steps=20, guidance_scale=3.0, generator=generator, output_type="pt").images
    assert images.shape == (12, 3, 32, 32)
    reward = ShapesReward().score(images, prompts).mean()
    shuffled = ShapesReward().score(images, prompts[1:] + prompts[:1]).mean()
    assert reward > 0.2  # imperfect on purpose
    assert shuffled < reward / 2  # it draws what it is asked for
