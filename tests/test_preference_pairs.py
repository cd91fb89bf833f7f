from __future__ import annotations

import io
import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from pairs_data import picture, rows, write_parquet, write_shards
from PIL import Image
from torch import nn

from datamodules.pairs.samples import EncodedPairs, PairTransform
from datamodules.preference_pairs import PreferencePairsDataModule
from datamodules.shards.locate import open_shards
from datamodules.shards.manifest import LatentsKey, Manifest
from datamodules.shards.samples import latent_members, pixel_members
from datamodules.shards.writer import write_shard
from datamodules.stream.order import ShuffledOrder, StoredOrder
from datamodules.stream.positions import RunSampler
from experiments import prepare_pickapic
from lightning_modules.batches import LatentPairs, PreferencePairs
from lightning_modules.errors import ConfigError, DataError
from lightning_modules.randomness import generator, rand


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 pairs in 5 shards: a number that neither 4 nor 5 divides."""
    return write_shards(tmp_path_factory.mktemp("pairs") / "data", [5, 5, 5, 5, 3])


def module(folder: Path, batch_size: int = 4, **changes) -> PreferencePairsDataModule:
    return PreferencePairsDataModule(str(folder), batch_size, **{"resolution": 8, "shuffle_shards": 2, **changes})


class Recorder(L.LightningModule):
    """Trains one number and remembers the batches: index and caption of every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[list[tuple[int, str]]] = []
        self.validated: list[str] = []

    def training_step(self, batch: PreferencePairs, batch_index: int) -> torch.Tensor:
        self.seen.append(list(zip(batch.indices.tolist(), batch.prompts)))
        return self.weight * batch.chosen.mean()

    def validation_step(self, batch: PreferencePairs, batch_index: int) -> None:
        self.validated += batch.prompts

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(root: Path, steps: int, **changes) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(
        default_root_dir=root, max_steps=steps, max_epochs=-1, accelerator="cpu", num_sanity_val_steps=0,
        enable_checkpointing=False, **quiet, **changes,
    )  # fmt: skip


def run(
    data: PreferencePairsDataModule, root: Path, steps: int, ckpt: Path | None = None
) -> tuple[Recorder, L.Trainer]:
    recorder, training = Recorder(), trainer(root, steps)
    training.fit(recorder, data, ckpt_path=ckpt)
    return recorder, training


def samples(recorder: Recorder) -> list[tuple[int, str]]:
    return [sample for batch in recorder.seen for sample in batch]


# ------------------------------------------------------------------------------------------- pictures


def pil(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_time_ids_of_a_centre_crop_against_numbers_by_hand() -> None:
    # 40 wide, 20 high -> short side 10: resized to 20 x 10, 10 pixels too wide, 5 of them on the left.
    # 15 wide, 30 high -> resized to 10 x 20, 5 of 10 above.
    first, second, first_ids, second_ids = PairTransform(10)(pil(picture(0, (40, 20))), pil(picture(1, (15, 30))), None)
    assert first.shape == second.shape == (3, 10, 10)
    assert first_ids.tolist() == [20, 40, 0, 5, 10, 10]
    assert second_ids.tolist() == [30, 15, 5, 0, 10, 10]


def test_a_small_picture_is_enlarged_and_its_original_size_told() -> None:
    pixels, _, ids, _ = PairTransform(32)(pil(picture(0, (8, 8))), pil(picture(0, (8, 8))), None)
    assert pixels.shape == (3, 32, 32)
    assert ids.tolist() == [8, 8, 0, 0, 32, 32]


def test_pixels_are_scaled_to_minus_one_and_one() -> None:
    image = Image.fromarray(np.array([[[0, 255, 51]]], dtype=np.uint8))
    pixels, *_ = PairTransform(1)(image, image, None)
    torch.testing.assert_close(pixels.flatten(), torch.tensor([-1.0, 1.0, -0.6]))


def flipped_source() -> torch.Generator:
    """The first generator of this family whose first draw says flip."""
    for n in range(100):
        if torch.rand(1, generator=generator("flip", n)) < 0.5:
            return generator("flip", n)
    raise AssertionError


def test_a_flip_mirrors_both_pictures_and_the_crop_offset() -> None:
    # 41 x 20 at side 20: no resizing, 21 columns too many; the centre crop leaves 10 on the left and 11 on the right.
    image = pil(picture(9, (41, 20)))
    plain, _, plain_ids, _ = PairTransform(20)(image, image, None)
    first, second, first_ids, second_ids = PairTransform(20, horizontal_flip=True)(image, image, flipped_source())
    assert torch.equal(first, plain.flip(-1))
    assert torch.equal(second, first)
    assert plain_ids.tolist() == [20, 41, 0, 10, 20, 20]
    assert first_ids.tolist() == second_ids.tolist() == [20, 41, 0, 11, 20, 20]


def test_chosen_and_rejected_share_flip_and_relative_crop() -> None:
    transform = PairTransform(10, random_crop=True, horizontal_flip=True)
    wide, wider = pil(picture(0, (30, 10))), pil(picture(0, (50, 10)))
    lefts = set()
    for n in range(20):
        first, second, first_ids, second_ids = transform(wide, wider, generator("crop", n))
        left, wider_left = first_ids[3].item(), second_ids[3].item()
        assert abs(wider_left / 40 - left / 20) <= 1 / 20  # whole pixels of the smaller range
        # Green rises to the right in both pictures, so a flip shows in its sign.
        assert (first[1, 0, -1] - first[1, 0, 0]).sign() == (second[1, 0, -1] - second[1, 0, 0]).sign()
        lefts.add(left)
    assert len(lefts) > 5


def test_a_random_crop_is_the_part_of_the_picture_its_offset_names() -> None:
    image = pil(picture(0, (30, 10)))
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    pixels, _, ids, _ = PairTransform(10, random_crop=True)(image, image, generator("crop", 3))
    left = int(ids[3])
    assert torch.equal(pixels, whole[:, :, left : left + 10])


def test_half_of_the_pairs_are_mirrored_and_crops_move_along_both_sides() -> None:
    """Flip, column and row are three draws: of 400, a share of flips within 5 standard deviations (0.125) of a half."""
    transform = PairTransform(10, random_crop=True, horizontal_flip=True)
    wide, tall = pil(picture(0, (30, 10))), pil(picture(0, (10, 30)))
    flips, across, down = [], [], []
    for n in range(400):
        pixels, _, ids, tall_ids = transform(wide, tall, generator("draws", n))
        flips.append(float(pixels[1, 0, -1] < pixels[1, 0, 0]))  # green rises to the right
        left = ids[3].item()
        across.append(20 - left if flips[-1] else left)
        down.append(tall_ids[2].item())
        flip, column, row = rand([generator("draws", n)] * 3).tolist()
        assert (flips[-1], across[-1], down[-1]) == (flip < 0.5, int(20 * column), int(20 * row))
    assert abs(np.mean(flips) - 0.5) < 0.125
    for values in (across, down):
        assert abs(np.mean(values) - 9.5) < 5 * (20 / 12**0.5) / 400**0.5  # int() of a uniform number below 20
    for one, other in ((flips, across), (flips, down), (across, down)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / 400**0.5


def test_latents_come_out_as_they_went_in_each_with_its_own_time_ids(tmp_path: Path) -> None:
    latents = {"chosen": torch.full((4, 2, 2), 1.0), "rejected": torch.full((4, 2, 2), -1.0)}
    embeds = {"embeds": torch.full((3, 5), 2.0), "pooled": torch.full((6,), 3.0)}
    ids = {"chosen_time_ids": [20, 40, 1, 2, 10, 10], "rejected_time_ids": [30, 15, 3, 4, 10, 10]}
    infos = [{"caption": "a", **ids}, {"caption": "b", **ids, "embeds_key": "000000000"}]
    members = [(0, latent_members(latents, embeds, infos[0])), (1, latent_members(latents, None, infos[1]))]
    info = write_shard(tmp_path / "00000.tar", members)
    Manifest("latents", (info,), latents=LatentsKey("", 16, "centre", "float32")).write(tmp_path)
    pairs = EncodedPairs(open_shards(str(tmp_path)), StoredOrder([2]))
    batch = LatentPairs.cat([pairs[0], pairs.item(7, 1)])
    for part, value in (
        (batch.chosen, 1), (batch.rejected, -1), (batch.cond.embeds, 2), (batch.cond.pooled, 3)
    ):  # fmt: skip
        assert part.unique().tolist() == [value]
        assert len(part) == 2
    assert batch.chosen_time_ids.tolist() == [ids["chosen_time_ids"]] * 2
    assert batch.rejected_time_ids.tolist() == [ids["rejected_time_ids"]] * 2
    assert (batch.prompts, batch.indices.tolist()) == (("a", "b"), [0, 7])


# ------------------------------------------------------------------------------------------- sampling


def drawn(total: int, batch_size: int, world: int, position: int, epochs: int = 1) -> list[list[list[int]]]:
    """Per rank, its batches, epoch after epoch."""
    ranks = []
    for rank in range(world):
        batches, at = [], position
        for _ in range(epochs):
            sampler = RunSampler(total, batch_size, rank, world, lambda at=at: at)
            indices = list(sampler)
            assert len(indices) == len(sampler)
            batches += [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
            at += len(sampler) * world
        ranks.append(batches)
    return ranks


@pytest.mark.parametrize("position", [0, 8, 37])
def test_two_ranks_have_equal_batches_disjoint_samples_and_the_order_of_one(position: int) -> None:
    one = drawn(23, 4, 1, position, 3)[0]
    first, second = drawn(23, 2, 2, position, 3)
    assert len(first) == len(second) == len(one)
    assert [a + b for a, b in zip(first, second)] == one


def test_what_an_epoch_leaves_over_opens_the_next() -> None:
    (batches,) = drawn(23, 4, 1, 0, 2)
    assert [n for batch in batches for n in batch] == list(range(40))


def global_sequence(folder: Path, batch_size: int, world: int, workers: int) -> list[tuple[int, str, float]]:
    """What all ranks together train on in an epoch, in the order of the batches."""
    data = module(folder, batch_size, num_workers=workers, horizontal_flip=True)
    data.setup("fit")
    ranks = []
    for rank in range(world):
        sampler = RunSampler(len(data.train_set), batch_size, rank, world, data.samples_seen)
        ranks.append(list(data._loader(data.train_set, sampler)))
    return [
        (n, prompt, pixels.sum().item())
        for batches in zip(*ranks)
        for batch in batches
        for n, prompt, pixels in zip(batch.indices.tolist(), batch.prompts, batch.chosen)
    ]


def test_ranks_batch_size_and_workers_do_not_change_the_sequence(folder: Path) -> None:
    expected = global_sequence(folder, 4, 1, 0)
    assert len(expected) == 20
    assert global_sequence(folder, 2, 2, 0) == expected
    assert global_sequence(folder, 4, 1, 2) == expected
    assert global_sequence(folder, 2, 2, 2) == expected


def test_a_batch_carries_what_the_shards_hold(folder: Path) -> None:
    data = module(folder, 4, horizontal_flip=False)
    batch = next(iter(data.train_dataloader()))
    stored, order = open_shards(str(folder)), ShuffledOrder([5, 5, 5, 5, 3], 0, 2)
    assert batch.prompts == tuple(stored.read(*order[n]).info()["caption"] for n in range(4))
    numbers = [int(prompt.split()[1]) for prompt in batch.prompts]
    reds = ((batch.chosen[:, 0] + 1) * 127.5).mean(dim=(1, 2)).round().int().tolist()
    other_reds = ((batch.rejected[:, 0] + 1) * 127.5).mean(dim=(1, 2)).round().int().tolist()
    assert reds == numbers
    assert other_reds == [n + 128 for n in numbers]
    assert batch.chosen_time_ids.tolist() == [[8, 8, 0, 0, 8, 8]] * 4


def test_iterating_twice_gives_the_same(folder: Path) -> None:
    loader = module(folder).train_dataloader()
    first, second = ([batch.prompts for batch in loader] for _ in range(2))
    assert first == second
    assert len(first) == len(loader) == 5


# --------------------------------------------------------------------------------------- with Lightning


def test_epochs_follow_one_another_without_loss(folder: Path, tmp_path: Path) -> None:
    recorder, _ = run(module(folder), tmp_path, 12)  # 5 batches an epoch
    assert [n for n, _ in samples(recorder)] == list(range(48))
    first_pass = [caption for n, caption in samples(recorder) if n < 23]
    assert sorted(first_pass) == sorted(f"caption {n}" for n in range(23))


def test_an_epoch_is_of_whole_optimizer_steps(folder: Path, tmp_path: Path) -> None:
    """23 pairs in batches of 4, two per step: an epoch of 5 batches would end in a step with half a gradient."""
    recorder, training = Recorder(), trainer(tmp_path, 6, accumulate_grad_batches=2)
    training.fit(recorder, module(folder))
    assert [n for n, _ in samples(recorder)] == list(range(6 * 2 * 4))
    assert training.current_epoch == 3  # of two steps each; what is left over opens the next epoch

    with pytest.raises(DataError, match="23 usable pairs, one optimizer step needs 24 .*4 x 1 ranks x 6 accumulated"):
        trainer(tmp_path, 1, accumulate_grad_batches=6).fit(Recorder(), module(folder))
    for limit, batches in ((3, 3), (0.8, 3)):
        with pytest.raises(ConfigError, match=f"limit_train_batches {limit} ends an epoch after {batches} batches"):
            trainer(tmp_path, 1, accumulate_grad_batches=2, limit_train_batches=limit).fit(Recorder(), module(folder))


@pytest.mark.parametrize("stop", [3, 5, 8])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_continues_where_it_stopped(folder: Path, tmp_path: Path, stop: int, workers: int) -> None:
    whole, _ = run(module(folder), tmp_path, 12)
    begun, training = run(module(folder, num_workers=workers), tmp_path, stop)
    training.save_checkpoint(tmp_path / "stop.ckpt")
    resumed, _ = run(module(folder, num_workers=workers), tmp_path, 12, tmp_path / "stop.ckpt")
    assert begun.seen + resumed.seen == whole.seen


def test_another_batch_size_on_resume_goes_on_from_the_same_sample(folder: Path, tmp_path: Path) -> None:
    whole, _ = run(module(folder, 4), tmp_path, 6)
    begun, training = run(module(folder, 4), tmp_path, 3)
    training.save_checkpoint(tmp_path / "stop.ckpt")
    resumed, training = run(module(folder, 2), tmp_path, 6, tmp_path / "stop.ckpt")
    assert samples(begun) + samples(resumed) == samples(whole)[: 3 * 4 + 3 * 2]
    assert training.datamodule.state_dict()["samples_seen"] == 18


def test_batch_counters_set_back_in_the_checkpoint_set_the_data_back(folder: Path, tmp_path: Path) -> None:
    whole, training = run(module(folder), tmp_path, 4)
    training.save_checkpoint(tmp_path / "stop.ckpt")
    checkpoint = torch.load(tmp_path / "stop.ckpt")
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counters in (progress["total"], progress["current"]):
        counters.update({name: value - 1 for name, value in counters.items()})
    torch.save(checkpoint, tmp_path / "stop.ckpt")
    resumed, _ = run(module(folder), tmp_path, 5, tmp_path / "stop.ckpt")
    assert resumed.seen[0] == whole.seen[3]


@pytest.mark.parametrize(
    ("changes", "named"), [({"seed": 1}, "seed 0 .now 1"), ({"shuffle_shards": 3}, "shuffle_shards 2 .now 3")]
)
def test_another_order_is_refused_on_resume(folder: Path, tmp_path: Path, changes: dict[str, int], named: str) -> None:
    _, training = run(module(folder), tmp_path, 2)
    training.save_checkpoint(tmp_path / "stop.ckpt")
    with pytest.raises(DataError, match=named):
        run(module(folder, **changes), tmp_path, 3, tmp_path / "stop.ckpt")


def test_another_data_set_is_refused_on_resume(folder: Path, tmp_path: Path) -> None:
    _, training = run(module(folder), tmp_path, 2)
    training.save_checkpoint(tmp_path / "stop.ckpt")
    other = write_shards(tmp_path / "other", [5, 5, 5, 5, 3], (8, 9))
    with pytest.raises(DataError, match=r"made with data \w+ \(now \w+\), so its position means nothing for .*other"):
        run(module(other), tmp_path, 3, tmp_path / "stop.ckpt")


def test_validation_reads_every_pair_in_stored_order(folder: Path, tmp_path: Path) -> None:
    data, recorder = module(folder, 4, val_shards=str(folder)), Recorder()
    trainer(tmp_path, 1).validate(recorder, data, verbose=False)
    assert recorder.validated == [f"caption {n}" for n in range(23)]


def test_a_batch_stacks_rows_in_order(folder: Path) -> None:
    data = module(folder)
    data.setup("fit")
    batch = PreferencePairs.cat([data.train_set[n] for n in (3, 1)])
    assert batch.indices.tolist() == [3, 1]
    assert torch.equal(batch.chosen[1:], data.train_set[1].chosen)


def test_pairs_that_are_ties_are_refused(tmp_path: Path) -> None:
    ties = write_shards(tmp_path / "ties", [4])
    manifest = json.loads((ties / "manifest.json").read_text())
    (ties / "manifest.json").write_text(json.dumps({**manifest, "counts": {"ties_kept": 1}}))
    with pytest.raises(DataError, match="holds ties.*--keep-ties"):
        module(ties).setup("fit")


def test_a_module_that_reads_labels_may_have_ties(tmp_path: Path) -> None:
    ties = write_shards(tmp_path / "ties", [4])
    manifest = json.loads((ties / "manifest.json").read_text())
    (ties / "manifest.json").write_text(json.dumps({**manifest, "counts": {"ties_kept": 1}}))
    module(ties, ties=True).setup("fit")


def test_labels_and_weights_are_those_of_the_data_set_and_1_where_it_has_none(tmp_path: Path) -> None:
    content = rows(3)
    content[1] |= {"label_0": 0.5, "label_1": 0.5, "num_example_per_prompt": 4}
    write_parquet(tmp_path / "pairs.parquet", content)
    prepare_pickapic.main(
        ["--input", str(tmp_path / "pairs.parquet"), "--output", str(tmp_path / "shards"), "--keep-ties"]
    )
    for shards, labels, weights in (
        (tmp_path / "shards", [1.0, 0.5, 1.0], [1 / 3, 0.25, 1 / 3]),
        (write_shards(tmp_path / "plain", [3]), [1.0] * 3, [1.0] * 3),
    ):
        data = module(shards, ties=True, val_shards=str(shards))
        data.setup("fit")
        batch = PreferencePairs.cat([data.val_set[n] for n in range(3)])
        assert batch.labels.tolist() == labels
        assert batch.weights.tolist() == pytest.approx(weights)


def test_a_label_that_cannot_be_is_one_clear_message(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    info = {"caption": "a", "label": 0.2}
    shard = write_shard(folder / "00000.tar", [(0, pixel_members(picture(0), picture(1), info))])
    Manifest("pixels", (shard,), {"pairs": 1}).write(folder)
    data = module(folder, 1)
    data.setup("fit")
    with pytest.raises(DataError, match=r"00000\.tar, sample 000000000: label must lie in \[0\.5, 1\.0\], got 0\.2"):
        data.train_set[0]


@pytest.mark.parametrize(("devices", "strategy", "refused"), [(1, "auto", False), (1, "ddp", True), (2, "ddp", True)])
def test_a_trainer_that_would_replace_the_sampler_is_refused(folder, devices, strategy, refused):
    """Lightning's would give each rank a part of ours: other samples than the position says."""
    data = module(folder)
    data.trainer = L.Trainer(accelerator="cpu", logger=False, devices=devices, strategy=strategy)
    if refused:
        with pytest.raises(ConfigError, match="set trainer.use_distributed_sampler to false"):
            data.setup("fit")
    else:
        data.setup("fit")
