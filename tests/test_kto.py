"""KTO: the official losses, over one and two processes; its pictures, their order, their preparation, and bad input."""

import json
import math
import multiprocessing
from collections import Counter

import pyarrow
import pytest
import torch
from objective_inputs import SCHEDULE, constant, generators
from pairs_data import picture, rows, write_parquet, write_shards
from picture_data import write_both, write_pictures
from torch import distributed

from datamodules.preference_pairs import PreferencePairsDataModule
from datamodules.shards.locate import open_shards
from datamodules.shards.samples import pixel_members
from datamodules.shards.writer import write_shard
from datamodules.single.order import MixedOrder
from datamodules.single_pictures import SinglePicturesDataModule
from experiments import prepare_pairs, prepare_pictures, run
from lightning_modules.batches import Conditioning, LabelledLatents
from lightning_modules.errors import ConfigError, DataError
from lightning_modules.objectives import KTO
from lightning_modules.objectives.pairwise import NoisedPairs

# ------------------------------------------------------------------------------------------- the objective


def pictures(liked):
    b = len(liked)
    ids = torch.arange(6.0 * b).reshape(b, 6)
    latents = torch.randn(b, 4, 2, 2, generator=torch.Generator().manual_seed(b))
    return LabelledLatents(latents, torch.as_tensor(liked), ("a",) * b, ids, torch.arange(b))


def kto(objective, liked, target, policy, reference, timesteps=None):
    n = len(target)
    timesteps = torch.zeros(n, dtype=torch.int64) if timesteps is None else timesteps
    query = NoisedPairs(target, timesteps, Conditioning(torch.zeros(n, 1, 1)), target=target)
    return objective.loss(pictures(liked), query, policy, reference, SCHEDULE)


def known_kto(known, inputs, liked, objective=KTO()):  # noqa: B008  # frozen
    policy = known[f"{inputs}.model_pred"].clone().requires_grad_()
    output = kto(objective, known[f"{liked}.labels"], known[f"{inputs}.target"], policy, known[f"{inputs}.ref_pred"])
    output.loss.backward()
    return output, policy.grad


def assert_official(known, case, output, gradient):
    for twin in ("", "_fp64"):
        expected = known[f"{case}.loss{twin}"]
        torch.testing.assert_close(output.loss.to(expected.dtype), expected, rtol=0, atol=1e-5)
        if f"{case}.grad_model_pred{twin}" in known:
            gradients = known[f"{case}.grad_model_pred{twin}"]
            assert (gradient - gradients).abs().max() <= 1e-4 * gradients.abs().max()
    torch.testing.assert_close(output.metrics["baseline"], known[f"{case}.z0"], rtol=1e-5, atol=1e-9)
    if f"{case}.acc" in known:
        torch.testing.assert_close(output.metrics["accuracy"], known[f"{case}.acc"])
        for name, theirs in (("gain_liked", "diff_pos"), ("gain_unliked", "diff_neg")):
            torch.testing.assert_close(output.metrics[name], known[f"{case}.{theirs}"], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("case", ["main", "worse", "allpos", "allneg"])
def test_kto_is_the_official_loss(golden, case):
    known = golden("kto_loss")
    output, gradient = known_kto(known, "worse" if case == "worse" else "main", case)
    assert_official(known, case, output, gradient)
    assert (output.metrics["baseline"] == 0) == (case == "worse")


def test_kto_weighs_the_kinds_as_the_official_code(golden):
    known = golden("kto_loss")
    objective = KTO(beta=5000.0, liked_weight=1.0, unliked_weight=1.5)
    assert_official(known, "main.beta5000_l1_1.5", *known_kto(known, "main", "main", objective))


def _of_rank(rank, place, known, send):
    """One of two processes that share a baseline; the second one has no liked picture."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    output, gradient = known_kto(known, f"rank{rank}", f"rank{rank}")
    send.put((rank, output.loss.detach().numpy(), gradient.numpy(), {k: v.item() for k, v in output.metrics.items()}))
    distributed.barrier()
    distributed.destroy_process_group()


def test_the_baseline_is_the_mean_over_all_ranks(golden, tmp_path):
    """Each of two processes has the official loss of its rank; both together the one that one process has of both."""
    known = golden("kto_loss")
    context = multiprocessing.get_context("fork")
    send = context.SimpleQueue()
    ranks = [context.Process(target=_of_rank, args=(r, tmp_path / "meet", known, send)) for r in (0, 1)]
    for process in ranks:
        process.start()
    found = sorted((send.get() for _ in ranks), key=lambda result: result[0])
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    losses, gradients = [], []
    for rank, loss, gradient, metrics in found:
        losses.append(torch.from_numpy(loss))
        gradients.append(torch.from_numpy(gradient))
        output = type("Output", (), {"loss": losses[-1], "metrics": {k: torch.tensor(v) for k, v in metrics.items()}})
        if rank == 1:
            assert math.isnan(metrics["gain_liked"])
            output.metrics["gain_liked"] = known["rank1.diff_pos"]
        assert_official(known, f"rank{rank}", output, gradients[-1])
    both = {f"both.{name}": torch.cat([known[f"rank{r}.{name}"] for r in (0, 1)])
            for name in ("model_pred", "ref_pred", "target", "labels")}  # fmt: skip
    alone, gradient = known_kto(both, "both", "both")
    torch.testing.assert_close(torch.stack(losses).mean(), alone.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.cat(gradients) / 2, gradient, rtol=1e-4, atol=1e-9)


def test_kto_by_hand():
    """Errors: policy 1 and 4, reference 4 and 5: g = 3, 1, z = 2. The first is liked: sigmoid(-beta 1) of both."""
    policy = constant(1.0, 2.0)
    output = kto(KTO(beta=0.5), [True, False], constant(0.0, 0.0), policy, constant(2.0, 5**0.5))
    assert output.metrics["baseline"].item() == pytest.approx(2)
    assert output.metrics["accuracy"].item() == 1
    assert output.loss.item() == pytest.approx(1 / (1 + math.exp(0.5)), abs=1e-6)
    swapped = kto(KTO(beta=0.5), [False, True], constant(0.0, 0.0), policy, constant(2.0, 5**0.5))
    assert swapped.metrics["accuracy"].item() == 0
    assert swapped.loss.item() == pytest.approx(1 / (1 + math.exp(-0.5)), abs=1e-6)


def test_no_gradient_goes_through_the_baseline():
    """With it, two liked pictures of one gain would have none at all."""
    policy = constant(1.0, 1.0).requires_grad_()
    kto(KTO(beta=0.5), [True, True], constant(0.0, 0.0), policy, constant(2.0, 2.0)).loss.backward()
    assert (policy.grad > 0).all()


def test_every_picture_has_a_timestep_and_a_noise_of_its_own():
    batch = pictures([True, False, True])
    query = KTO().query(batch, Conditioning(torch.zeros(3, 1, 2)), SCHEDULE, generators())
    assert len(set(query.timesteps.tolist())) == 3
    assert not torch.equal(query.target[0], query.target[1])
    assert torch.equal(query.cond.time_ids, batch.time_ids)
    clean, _ = SCHEDULE.predict_clean(query.target, query.latents, query.timesteps)
    torch.testing.assert_close(clean, batch.latents, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["beta", "liked_weight", "unliked_weight"])
def test_settings_without_meaning_are_refused(name):
    with pytest.raises(ConfigError, match=f"objective.{name} must be above 0, got 0.0"):
        KTO(**{name: 0.0})


# ------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("share", [0.8, 0.5, 0.1])
def test_a_share_of_the_stream_is_liked_and_each_kind_comes_without_replacement(share):
    order = MixedOrder((4, 3), (5, 6), seed=3, shuffle_shards=2, share=share)
    kinds = [order.at(n)[0] < 2 for n in range(640)]
    assert sum(kinds) == round(640 * share)
    for block in range(0, 640, 64):
        assert abs(sum(kinds[block : block + 64]) - 64 * share) < 1
    for liked, number in ((True, 7), (False, 11)):
        places = [order.at(n) for n in range(640) if kinds[n] == liked]
        for epoch in range(len(places) // number):
            assert len(set(places[epoch * number : (epoch + 1) * number])) == number
        following = [order.at(n, 1) for n in range(640) if kinds[n] == liked]
        assert following[:-1] == places[1:]
    other = MixedOrder((4, 3), (5, 6), 4, 2, share)
    assert kinds != [other.at(n)[0] < 2 for n in range(640)]


def test_a_place_does_not_depend_on_those_before_it():
    whole = MixedOrder((4, 3), (6,), seed=3, shuffle_shards=1, share=0.3)
    expected = [whole.at(n) for n in range(300)]
    for n in (299, 5, 64, 128, 0):
        assert MixedOrder((4, 3), (6,), seed=3, shuffle_shards=1, share=0.3).at(n) == expected[n]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_that_leaves_one_kind_out_is_refused(share):
    message = f"data.positive_ratio must lie in .0, 1., or be null for the data's own, got {share}"
    with pytest.raises(ConfigError, match=message):
        MixedOrder((3,), (3,), 0, 1, share)


# ------------------------------------------------------------------------------------------- the data module


def batches(data, ranks=1):
    """The batches of one epoch, of all ranks side by side."""
    found = []
    for rank in range(ranks):
        data.setup("fit")
        type(data).rank, type(data).world_size = rank, ranks
        found.append(list(data.train_dataloader()))
    return [batch for step in zip(*found) for batch in step]


@pytest.fixture
def module(tmp_path):
    class Ranked(SinglePicturesDataModule):  # each test's own, since the rank is set on it
        rank, world_size = 0, 1

    both = write_both(tmp_path)
    return lambda **settings: Ranked(**both | {"batch_size": 2, "resolution": 8, "seed": 5} | settings)


def test_batches_say_what_is_liked_and_keep_prompt_and_picture_together(module):
    found = batches(module(horizontal_flip=False))
    assert len(found) == 6
    for batch in found:
        for red, liked, prompt in zip(batch.pictures[:, 0, 0, 0], batch.liked.tolist(), batch.prompts):
            number = round((red.item() + 1) * 127.5)
            assert prompt == f"picture {number}"
            assert liked == (number < 100)
    numbers = [prompt for batch in found for prompt in batch.prompts]  # 12 of 13: a batch has two
    assert max(Counter(numbers).values()) == 1
    assert torch.cat([batch.indices for batch in found]).tolist() == list(range(12))


def test_two_ranks_read_what_one_reads(module):
    one = [prompt for batch in batches(module(batch_size=4, positive_ratio=0.8)) for prompt in batch.prompts]
    two = [prompt for batch in batches(module(positive_ratio=0.8), ranks=2) for prompt in batch.prompts]
    assert one == two
    assert sum(int(prompt.split()[1]) < 100 for prompt in one) > 8


def test_a_bad_picture_is_replaced_by_one_of_its_kind(module, tmp_path):
    """The liked picture 5 cannot be decoded, and the next liked one stands in its place; the unliked ones stay."""
    whole = [prompt for batch in batches(module(positive_ratio=0.5)) for prompt in batch.prompts]
    assert "picture 5" in whole
    write_shard(
        tmp_path / "liked" / "00001.tar",
        [(k, {"json": json.dumps({"caption": f"picture {k}", "liked": True}).encode(),
              "picture.png": picture(k, (8, 8))[: 30 if k == 5 else None]}) for k in (4, 5, 6)],
    )  # fmt: skip
    (tmp_path / "liked" / "manifest.json").unlink()
    data = module(liked=[str(tmp_path / "liked" / f"0000{n}.tar") for n in (0, 1)], positive_ratio=0.5)
    damaged = [(prompt, liked) for batch in batches(data) for prompt, liked in zip(batch.prompts, batch.liked.tolist())]
    assert "picture 5" not in [prompt for prompt, _ in damaged]
    for (prompt, liked), before in zip(damaged, whole, strict=True):
        assert liked == (int(before.split()[1]) < 100)
        if before != "picture 5":
            assert prompt == before


def test_pictures_given_as_the_other_kind_are_found_out(module, tmp_path):
    data = module(liked=str(tmp_path / "unliked"), unliked=str(tmp_path / "liked"), max_bad_share=0.0)
    with pytest.raises(DataError, match="liked is (false|true), in shards that were given as those of the other kind"):
        batches(data)


def test_a_label_that_is_none_is_a_bad_sample(module, tmp_path):
    write_shard(tmp_path / "odd.tar", [(0, {"json": b'{"caption": "a", "liked": 1}', "picture.png": picture(1)})])
    data = module(val_shards=str(tmp_path / "odd.tar"), max_bad_share=0.0)
    data.setup("validate")
    with pytest.raises(DataError, match="liked must be true or false, got '1'"):
        next(iter(data.val_dataloader()))


def test_validation_reads_both_kinds_in_their_order(module, tmp_path):
    data = module(val_shards=[str(tmp_path / "liked"), str(tmp_path / "unliked")])
    data.setup("validate")
    found = [prompt for batch in data.val_dataloader() for prompt in batch.prompts]
    assert found == [f"picture {n}" for n in [*range(7), *range(100, 106)]]


def test_a_kind_without_pictures_is_refused(module, tmp_path):
    empty = str(write_pictures(tmp_path / "none", True, []))
    with pytest.raises(DataError, match="no shards in"):
        module(liked=empty).setup("fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positive_ratio": 0.3}, "positive_ratio 0.8 .now 0.3."),
        ({"seed": 6}, "seed 5 .now 6."),
    ],
)
def test_a_position_in_another_order_is_refused(module, settings, message):
    saved = module(positive_ratio=0.8).state_dict()
    with pytest.raises(DataError, match=message):
        module(**{"positive_ratio": 0.8} | settings).restore(saved)


def test_pairs_are_refused_where_single_pictures_are_wanted_and_the_reverse(module, tmp_path):
    shards = write_shards(tmp_path / "pairs", [3])
    with pytest.raises(DataError, match="holds pairs, and KTO trains on single pictures.*prepare_pictures"):
        module(liked=str(shards), unliked=str(shards)).setup("fit")
    with pytest.raises(DataError, match="do not go with the pixels"):
        module(liked=str(shards)).setup("fit")
    with pytest.raises(DataError, match="holds single pictures, liked or not; train on those with KTO"):
        PreferencePairsDataModule(str(tmp_path / "liked"), batch_size=1).setup("fit")
    for words, message in (
        (
            ["--config", "kto_tiny", "--model.objective=DPO"],
            "is for single pictures, liked or not, and .* DPO trains on pairs",
        ),
        (["--config", "dpo_tiny", "--model.objective=KTO"], "is for pairs, and .* KTO trains on single pictures"),
        (["--config", "spo_tiny", "--model.objective=KTO"], "is for pairs, and .* KTO trains on single pictures"),
    ):
        with pytest.raises(ConfigError, match=message):
            run.main([*words, "--run_dir", str(tmp_path / "run")])


# ------------------------------------------------------------------------------------------- the preparation


def contents(folder, side):
    """Prompt and red of every picture, and what it says of itself."""
    shards = open_shards(str(folder / side))
    found = []
    for shard, size in enumerate(shards.sizes):
        for row in range(size):
            sample = shards.read(shard, row)
            found.append((sample.info(), sample.picture("picture")))
    return shards, found


def test_pairs_become_pictures_each_once_and_both_is_as_it_is_told(tmp_path):
    """a beats b, b beats c, a beats b again; a tie says nothing: a is liked, c is not, b is both."""
    a, b, c, d = (picture(n) for n in (1, 2, 3, 4))
    pairs = [(a, b, 1.0), (b, c, 1.0), (a, b, 1.0), (c, d, 0.5)]
    samples = [(n, pixel_members(x, y, {"caption": "p", "label": label})) for n, (x, y, label) in enumerate(pairs)]
    samples.append((4, pixel_members(c, a, {"caption": "another prompt"})))
    write_shard(tmp_path / "pairs.tar", samples)
    expected = {
        "liked": ([(a, "p"), (b, "p"), (c, "another prompt")], [(c, "p"), (a, "another prompt")]),
        "unliked": ([(a, "p"), (c, "another prompt")], [(b, "p"), (c, "p"), (a, "another prompt")]),
        "drop": ([(a, "p"), (c, "another prompt")], [(c, "p"), (a, "another prompt")]),
    }
    for mixed, (liked, unliked) in expected.items():
        output = tmp_path / mixed
        words = ["--input", str(tmp_path / "pairs.tar"), "--output", str(output), "--mixed", mixed, "--shard-size", "2"]
        manifests = prepare_pictures.main(words)
        for side, wanted in (("liked", liked), ("unliked", unliked)):
            shards, found = contents(output, side)
            assert shards.kind == "pictures"
            assert [(data, info["caption"]) for info, data in found] == wanted
            assert all(info["liked"] == (side == "liked") for info, _ in found)
            assert max(shards.sizes) <= 2
        assert manifests["liked"].counts == {"pictures": len(liked), "read": 5, "ties_dropped": 1, "mixed": 1}
        assert json.loads((output / "captions.json").read_text()) == ["p", "another prompt"]


def test_a_table_becomes_pictures(tmp_path, capsys):
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(picture(n)[: 40 if n == 3 else None])
    (tmp_path / "2.txt").write_text("beside it")
    table = tmp_path / "ratings.csv"
    table.write_text("image,thumb\n0.png,yes\n1.png,0\n2.png,TRUE\n3.png,1\n")
    for n in (0, 1, 3):
        (tmp_path / f"{n}.caption").write_text(f"text {n}")
    words = ["--input", str(table), "--columns", "liked=thumb", "--output", str(tmp_path / "out")]
    prepare_pictures.main(words)
    assert [info["caption"] for info, _ in contents(tmp_path / "out", "liked")[1]] == ["text 0", "beside it"]
    assert [info["caption"] for info, _ in contents(tmp_path / "out", "unliked")[1]] == ["text 1"]
    said = capsys.readouterr().out
    assert "2 liked, 1 unliked pictures" in " ".join(said.split())
    assert "line 5: a damaged picture" in " ".join(said.split())
    before = (tmp_path / "out" / "liked" / "manifest.json").stat().st_mtime_ns
    prepare_pictures.main(words)
    assert (tmp_path / "out" / "liked" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="was prepared from another input or with other settings"):
        prepare_pictures.main([*words, "--mixed", "drop"])


def test_a_parquet_table_brings_its_pictures_along(tmp_path):
    rows_ = [{"image": {"bytes": picture(n), "path": None}, "liked": n % 2 == 0, "text": f"t{n}"} for n in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows_), tmp_path / "t.parquet")
    prepare_pictures.main(["--input", str(tmp_path / "t.parquet"), "--output", str(tmp_path / "out")])
    assert [(info["caption"], data) for info, data in contents(tmp_path / "out", "liked")[1]] == [
        ("t0", picture(0)),
        ("t2", picture(2)),
    ]


def test_an_interrupted_preparation_begins_again_and_leaves_nothing_of_the_first(tmp_path):
    shards = write_shards(tmp_path / "pairs", [3])
    output = tmp_path / "out"
    for side in ("liked", "unliked"):
        (output / side).mkdir(parents=True)
        (output / side / "00007.tar").write_bytes(b"half")
        (output / side / ".00000.tar-unfinished-1").write_bytes(b"half")
    words = ["--input", str(shards), "--output", str(output)]
    with pytest.raises(DataError, match="no manifest.json: its preparation has not finished"):
        open_shards(str(output / "liked"))
    prepare_pictures.main(words)
    files = sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    assert files == [
        "captions.json",
        *(f"{s}/{f}" for s in ("liked", "unliked") for f in ("00000.tar", "manifest.json")),
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / "t.csv").write_text("image,liked\na.png,1\n"), "the picture .*a.png does not exist"),
        (lambda folder: (folder / "t.csv").write_text("picture,liked\n"), "holds no liked pictures"),
        (lambda folder: (folder / "t.csv").write_text("picture,liked\n1,1\n"), "has the columns picture, liked; name"),
        (lambda folder: (folder / "t.csv").write_text("chosen,rejected\na,b\n"), "of pairs prepare_pairs makes shards"),
    ],
)  # fmt: skip
def test_a_table_that_says_something_else_is_one_line(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises((ConfigError, DataError), match=message):
        prepare_pictures.main(["--input", str(tmp_path / "t.csv"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "liked").exists()


def test_input_and_output_that_mean_something_else_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "t.csv").write_text("image,liked,prompt\na.png,maybe,x\n")
    words = ["--input", str(tmp_path / "t.csv"), "--output", str(tmp_path / "out")]
    with pytest.raises(DataError, match="line 2: liked is 'maybe'; want one of 1, true, yes, 0, false, no"):
        prepare_pictures.main(words)
    with pytest.raises(ConfigError, match=r"--columns names 'like' \(did you mean 'liked'\?\)"):
        prepare_pictures.main([*words, "--columns", "like=liked"])
    with pytest.raises(ConfigError, match=r"has no column 'lik' \(did you mean 'liked'\?\)"):
        prepare_pictures.main([*words, "--columns", "liked=lik"])
    shards = str(write_pictures(tmp_path / "single", True, [2]))
    with pytest.raises(DataError, match="holds single pictures already"):
        prepare_pictures.main(["--input", shards, "--output", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="--columns is for tables"):
        prepare_pictures.main(["--input", shards, "--output", str(tmp_path / "out"), "--columns", "liked=x"])
    with pytest.raises(DataError, match="has no chosen picture"):
        prepare_pairs.main(["--input", f"{shards}/00000.tar", "--output", str(tmp_path / "pairs")])
    (tmp_path / "mine" / "liked").mkdir(parents=True)
    (tmp_path / "mine" / "liked" / "holiday.png").write_bytes(b"x")
    pairs = str(write_shards(tmp_path / "shards", [2]))
    with pytest.raises(ConfigError, match="holds holiday.png and no preparation; choose another folder"):
        prepare_pictures.main(["--input", pairs, "--output", str(tmp_path / "mine")])
    assert [path.name for path in (tmp_path / "mine" / "liked").iterdir()] == ["holiday.png"]


def test_latents_are_refused(tmp_path, monkeypatch):
    write_parquet(tmp_path / "rows.parquet", rows(2))
    pairs = write_shards(tmp_path / "pairs", [2])
    manifest = json.loads((pairs / "manifest.json").read_text())
    key = {"hash": "0", "resolution": 8, "crop": "centre", "dtype": "float16"}
    (pairs / "manifest.json").write_text(json.dumps(manifest | {"kind": "latents", "latents": key}))
    with pytest.raises(DataError, match="holds latents; give the pairs as pictures"):
        prepare_pictures.main(["--input", str(pairs), "--output", str(tmp_path / "out")])
