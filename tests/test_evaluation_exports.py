"""Exports have the files that the evaluators look for, each with the right picture in it, or there is no export."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import evaluate
from experiments.evaluation.exports import export
from experiments.evaluation.results import Drawn, Evaluation
from lightning_modules.errors import ConfigError, DataError, UserError

SIDE = 8
PROMPTS = ["a photo of a bench", "a red cat.", 'two "dogs" & a ship', "Zwei größere Hunde"]


def colour(policy: int, prompt: int, picture: int) -> tuple[int, int, int]:
    return 50 * policy, 20 * prompt, 20 * picture


def evaluated(folder: Path, prompts: list[str], pictures: int) -> Evaluation:
    drawn = []
    for n, label in enumerate(["base", "dpo"]):
        scores = {"shapes": [[0.5] * pictures for _ in prompts]}
        drawn.append(Drawn(label, label, n == 0, 5.0, f"pictures/{label}", scores))
        for p in range(len(prompts)):
            for i in range(pictures):
                path = folder / drawn[n].picture(p, i)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (SIDE, SIDE), colour(n, p, i)).save(path)
    return Evaluation({}, prompts, drawn)


def exported(tmp_path: Path, kind: str, prompts: list[str], pictures: int, *files: Path) -> list[Path]:
    evaluation = evaluated(tmp_path / "evaluation", prompts, pictures)
    return export(kind, evaluation, tmp_path / "evaluation", tmp_path / "out", files)


def written(tmp_path: Path, name: str, content: object) -> Path:
    path = tmp_path / "files" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8", newline="")
    return path


def lines(entries: list[dict]) -> str:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def shown(path: Path) -> tuple[int, int, int]:
    with Image.open(path) as picture:
        return picture.getpixel((SIDE // 2, SIDE // 2))


def test_geneval_has_a_folder_per_prompt_with_its_line_and_its_pictures(tmp_path: Path) -> None:
    entries = [{"tag": "color", "include": [{"class": f"größe {n}", "count": 1}], "prompt": text}
               for n, text in enumerate(PROMPTS)]  # fmt: skip
    roots = exported(tmp_path, "geneval", PROMPTS, 2, written(tmp_path, "evaluation_metadata.jsonl", lines(entries)))
    assert roots == [tmp_path / "out" / "pictures" / label for label in ("base", "dpo")]
    for n, root in enumerate(roots):
        assert tree(root) == [f"0000{p}/{name}" for p in range(4)
                              for name in ("metadata.jsonl", "samples/00000.png", "samples/00001.png")]  # fmt: skip
        for p in range(4):
            assert json.loads((root / f"0000{p}" / "metadata.jsonl").read_bytes()) == entries[p]
            for i in range(2):
                assert shown(root / f"0000{p}" / "samples" / f"0000{i}.png") == colour(n, p, i)


def test_t2i_compbench_numbers_the_pictures_of_a_category_through(tmp_path: Path) -> None:
    first = written(tmp_path, "color_val.txt", "".join(f"{text}\r\n" for text in PROMPTS[:3]))
    second = written(tmp_path, "non_spatial_val.txt", PROMPTS[3])
    _, root = exported(tmp_path, "t2i_compbench", PROMPTS, 3, first, second)
    names = [f"color/samples/{text}_{3 * p + i:06d}.png" for p, text in enumerate(PROMPTS[:3]) for i in range(3)]
    names += [f"non_spatial/samples/{PROMPTS[3]}_{i:06d}.png" for i in range(3)]
    assert tree(root) == sorted(names)
    for number, name in enumerate(names):
        assert shown(root / name) == colour(1, number // 3, number % 3)
        assert Path(name).name.split("_")[0] == PROMPTS[number // 3]  # as its evaluators read it


def test_t2i_compbench_of_one_category_needs_no_file(tmp_path: Path) -> None:
    root, _ = exported(tmp_path, "t2i_compbench", PROMPTS[:1], 2)
    assert tree(root) == [f"samples/{PROMPTS[0]}_00000{i}.png" for i in (0, 1)]


def test_three_in_one_scores_want_ten_pictures(tmp_path: Path) -> None:
    file = written(tmp_path, "complex_val.txt", "\n".join(PROMPTS))
    with pytest.raises(ConfigError, match="blocks of 10 pictures and the evaluation has 2 per prompt"):
        exported(tmp_path, "t2i_compbench", PROMPTS, 2, file)
    root, _ = exported(tmp_path, "t2i_compbench", PROMPTS, 10, file)
    assert len(tree(root)) == 40
    assert (root / "complex" / "samples" / f"{PROMPTS[3]}_000039.png").is_file()


@pytest.mark.parametrize(
    ("prompt", "told"), [("a_b", "it holds '_'"), ("a/b", "it holds '/'"), ("ü" * 123, "255 bytes")]
)
def test_t2i_compbench_refuses_prompts_that_are_no_file_names(tmp_path: Path, prompt: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        exported(tmp_path, "t2i_compbench", [PROMPTS[0], prompt], 1)
    assert not (tmp_path / "out").exists()


def dpg_files(tmp_path: Path, texts: list[str]) -> Path:
    for n, text in enumerate(texts):
        folder = written(tmp_path, f"COCOval{9 - n}.txt", f" {text}\n").parent
    return folder


def test_dpg_bench_names_a_grid_of_four_as_the_file_of_its_prompt(tmp_path: Path) -> None:
    _, root = exported(tmp_path, "dpg", PROMPTS, 4, dpg_files(tmp_path, PROMPTS))
    assert tree(root) == [f"COCOval{n}.png" for n in (6, 7, 8, 9)]
    for p in range(4):
        with Image.open(root / f"COCOval{9 - p}.png") as picture:
            grid = np.asarray(picture)
        assert grid.shape == (2 * SIDE, 2 * SIDE, 3)
        corners = [tuple(grid[y, x].tolist()) for y in (0, SIDE) for x in (0, SIDE)]
        assert corners == [colour(1, p, i) for i in range(4)]


def test_dpg_bench_takes_one_picture_as_it_is_and_gives_each_of_two_equal_files_a_prompt(tmp_path: Path) -> None:
    texts = ["a", " b ", "a"]  # outer spaces are part of a prompt, and not of what a file is found by
    root, _ = exported(tmp_path, "dpg", texts, 1, dpg_files(tmp_path, texts))
    assert [shown(root / f"COCOval{n}.png") for n in (7, 8, 9)] == [colour(0, p, 0) for p in (0, 1, 2)]


def test_hpsv2_has_a_folder_per_style_and_jpegs_by_their_place_in_it(tmp_path: Path) -> None:
    anime, photo = written(tmp_path, "anime.json", PROMPTS[:3]), written(tmp_path, "photo.json", PROMPTS[3:])
    for files in ((anime, photo), (anime.parent,)):
        roots = exported(tmp_path, "hpsv2", PROMPTS, 1, *files)
        for n, root in enumerate(roots):
            names = [*(f"anime/0000{p}.jpg" for p in range(3)), "photo/00000.jpg"]
            assert tree(root) == names
            for p, name in enumerate(names):
                with Image.open(root / name) as picture:
                    assert picture.format == "JPEG"
                    assert np.allclose(picture.getpixel((0, 0)), colour(n, p, 0), atol=2)
        (tmp_path / "out").rename(tmp_path / "first") if len(files) == 2 else None


def test_jpegs_keep_colours_apart(tmp_path: Path) -> None:
    """Half the resolution of colours, JPEG's default, would mix red and blue columns."""
    evaluation = evaluated(tmp_path, PROMPTS[:1], 1)
    stripes = np.zeros((SIDE, SIDE, 3), np.uint8)
    stripes[:, ::2, 0] = stripes[:, 1::2, 2] = 255
    Image.fromarray(stripes).save(tmp_path / evaluation.drawn[0].picture(0, 0))
    root, _ = export("hpsv2", evaluation, tmp_path, tmp_path / "out", [written(tmp_path, "anime.json", PROMPTS[:1])])
    with Image.open(root / "anime" / "00000.jpg") as picture:
        assert np.abs(np.asarray(picture).astype(int) - stripes).max() <= 3


REFUSED = [
    ("geneval", 1, {}, "wants GenEval's one file"),
    ("geneval", 1, {"m.jsonl": lines([{"prompt": text} for text in PROMPTS[::-1]])}, "prompt 0 of the evaluation is"),
    ("geneval", 1, {"m.jsonl": lines([{"prompt": text} for text in PROMPTS[:3]])}, "has 4 prompts and .*m.jsonl 3;"),
    ("geneval", 1, {"m.jsonl": "".join(f"{json.dumps(text)}\n" for text in PROMPTS)}, "line 1 is no object"),
    ("t2i_compbench", 1, {"color_val.txt": "\n".join([*PROMPTS, "x"])}, "has 4 prompts and .*color_val.txt 5;"),
    ("t2i_compbench", 1, {"color_val.txt": PROMPTS[0], "color.txt": "\n".join(PROMPTS[1:])}, "have one name"),
    ("dpg", 2, {"1.txt": PROMPTS[0]}, "reads 1 or 4 pictures per prompt and the evaluation has 2"),
    ("dpg", 4, {"1.txt": PROMPTS[0]}, "no file among .*1.txt holds prompt 1, 'a red cat.'"),
    ("dpg", 4, {f"{n}.txt": text for n, text in enumerate([*PROMPTS, "a bird"])}, "1 prompt files, 4.txt for one"),
    ("hpsv2", 1, {}, "JSON file per style"),
    ("hpsv2", 2, {"anime.json": json.dumps(PROMPTS)}, "reads 1 picture per prompt and the evaluation has 2"),
    ("hpsv2", 1, {"anime.json": json.dumps(["a bird"])}, "'a bird'; name the files that its prompts were read from"),
    ("fid", 1, {}, "'fid' is not known; one of geneval, t2i_compbench, dpg, hpsv2"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "pictures", "files", "told"), REFUSED)
def test_what_does_not_agree_is_refused_in_one_line_and_nothing_is_written(
    tmp_path: Path, kind: str, pictures: int, files: dict[str, str], told: str
) -> None:
    paths = [written(tmp_path, name, content) for name, content in files.items()]
    with pytest.raises(UserError, match=told) as caught:
        exported(tmp_path, kind, PROMPTS, pictures, *paths)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation", *(["files"] if files else [])]


def test_an_output_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(DataError, match="is there already"):
        exported(tmp_path, "t2i_compbench", PROMPTS[:1], 1)
    assert tree(tmp_path / "out") == ["mine"]


@pytest.mark.parametrize("damage", ["missing", "no picture"])
def test_a_missing_or_damaged_picture_is_told_and_leaves_no_half_export(tmp_path: Path, damage: str) -> None:
    evaluation = evaluated(tmp_path, PROMPTS, 4)
    path = tmp_path / evaluation.drawn[1].picture(2, 3)
    path.unlink() if damage == "missing" else path.write_bytes(b"x")
    with pytest.raises(DataError, match=r"dpo/00002_03\.png.*what is missing is drawn"):
        export("dpg", evaluation, tmp_path, tmp_path / "out", [dpg_files(tmp_path, PROMPTS)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["../elsewhere", "/tmp", ""])
def test_a_policy_folder_outside_of_the_evaluation_is_refused(tmp_path: Path, folder: str) -> None:
    drawn = Drawn("x", "x", False, 5.0, folder, {"shapes": [[0.5]]})
    with pytest.raises(DataError, match="outside of it"):
        export("t2i_compbench", Evaluation({}, ["a"], [drawn]), tmp_path, tmp_path / "out")


def test_the_command_tells_what_does_not_agree_before_it_draws(tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = ["--policy=embedded/shapes", "--protocol=shapes", f"--output={output}", "--export=hpsv2"]
    with pytest.raises(ConfigError, match="JSON file per style"):
        evaluate.main(words)
    assert not output.exists()
