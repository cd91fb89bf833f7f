"""The page to choose on: what is recorded is which picture won, nothing answered is lost, and nobody else gets in."""

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from pairs_data import rows, write_parquet
from PIL import Image

from experiments import label
from experiments.labelling.choices import ChoiceLog, checked_name
from experiments.labelling.pairs import PicturePair, read_pairs
from experiments.labelling.server import application
from experiments.labelling.session import Session
from experiments.labelling.supply import ListedPairs, PairSource, Stopped, Supply
from experiments.labelling.unpacking import ParquetPairs
from lightning_modules.errors import ConfigError, DataError, UserError

pytestmark = pytest.mark.label

SCRIPT = "<script>document.title = 'taken'</script> a cat & \"quotes\""


def paint(path: Path, colour: tuple[int, int, int] = (0, 0, 0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 16), colour).save(path)
    return path


def make_folder(folder: Path, count: int) -> Path:
    """Pair n has the red n, and picture i of it the green 100 i."""
    for n in range(count):
        for i in (0, 1):
            paint(folder / f"pair{n:03d}_{i}.png", (n, 100 * i, 0))
        (folder / f"pair{n:03d}.txt").write_text(SCRIPT if n == 1 else f"prompt {n}")
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "pairs", 20)


@contextmanager
def opened(folder: Path, seed: int = 0):
    log = ChoiceLog(folder)
    try:
        yield Session(Supply(ListedPairs(read_pairs(folder, folder)), 16), log, seed)
    finally:
        log.close()


def counted(path: Path) -> dict:
    """What a reader takes out of the record, by the rule that it states: the last line of each counts, null is none."""
    last = {}
    for line in path.read_text().split("\n")[:-1]:
        entry = json.loads(line)
        key = entry["image_0"], entry["image_1"], entry["prompt"], entry["annotator"]
        last.pop(key, None)
        last[key] = entry["choice"]
    return {key: choice for key, choice in last.items() if choice is not None}


# ------------------------------------------------------------------------------------------ choices


def test_what_is_written_is_which_picture_won_wherever_it_was_shown(folder):
    with opened(folder) as session:
        at_left = []
        for pair in list(session.supply.pairs):
            shown = [
                Image.open(session.picture(pair.key, side)).getpixel((0, 0))[1] // 100 for side in ("left", "right")
            ]
            at_left.append(shown[0])
            assert sorted(shown) == [0, 1]
            session.choose("ann", pair.key, "left" if len(at_left) % 2 else "right")
    assert set(at_left) == {0, 1}
    expected = [side if n % 2 == 0 else 1 - side for n, side in enumerate(at_left)]
    assert list(counted(folder / "choices.jsonl").values()) == expected
    entries = [json.loads(line) for line in (folder / "choices.jsonl").read_text().splitlines()]
    assert [entry["left"] for entry in entries] == at_left
    assert entries[1]["prompt"] == SCRIPT
    assert (folder / entries[1]["image_1"]).is_file()


def test_the_sides_are_drawn_from_seed_and_pair(folder):
    def sides(seed):
        with opened(folder, seed) as session:
            return [session.at_left(pair) for pair in session.supply.pairs]

    assert sides(0) == sides(0)
    assert sides(0) != sides(1)
    many = [PicturePair(f"{n}_0.png", f"{n}_1.png", "x") for n in range(1000)]
    with opened(folder) as session:
        assert 420 < sum(map(session.at_left, many)) < 580  # 5 standard deviations


def test_the_record_and_the_memory_agree_after_any_sequence_of_acts(folder):
    draw = random.Random(0)
    with opened(folder) as session:
        for _ in range(300):
            name, pair = draw.choice(["ann", "bob"]), draw.choice(session.supply.pairs)
            if draw.random() < 0.3:
                session.undo(name, pair.key)
            else:
                session.choose(name, pair.key, draw.choice(["left", "right", "tie", "skip"]))
        before = {name: session.log.answers(name) for name in ("ann", "bob")}
    with opened(folder) as session:
        for name in ("ann", "bob"):
            assert list(session.log.answers(name).items()) == list(
                before[name].items()
            )  # the order, too: undo needs it
            chosen = [answer for answer in before[name].values() if answer != "skip"]
            assert [value for key, value in counted(session.log.path).items() if key[3] == name] == chosen


def test_undo_leads_back_one_by_one_also_after_a_restart(folder):
    with opened(folder) as session:
        keys = [pair.key for pair in session.supply.pairs]
        for key, answer in zip(keys, ["left", "skip", "tie"]):
            state = session.choose("ann", key, answer)
        assert (state["pair"]["key"], state["last"]) == (keys[3], keys[2])
    with opened(folder) as session:
        for number in (2, 1, 0):
            state = session.undo("ann", session.state("ann")["last"])
            assert state["pair"]["key"] == keys[number]
        assert state["last"] is None
        assert counted(session.log.path) == {}


def test_what_arrives_twice_is_recorded_once(folder):
    with opened(folder) as session:
        first, second = (pair.key for pair in session.supply.pairs[:2])
        session.choose("ann", first, "left")
        session.choose("ann", second, "tie")
        size = session.log.path.stat().st_size
        session.choose("ann", second, "tie")
        assert session.log.path.stat().st_size == size
        session.undo("ann", second)
        size = session.log.path.stat().st_size
        session.undo("ann", second)  # the first choice is not what was meant
        assert session.log.path.stat().st_size == size
        assert session.state("ann")["chosen"] == 1


def test_each_person_has_choices_of_their_own(folder):
    with opened(folder) as session:
        key = session.supply.pairs[0].key
        session.choose("ann", key, "left")
        session.choose("bob", key, "right")
        assert session.state("ann")["chosen"] == session.state("bob")["chosen"] == 1
        session.undo("ann", key)
        assert [key[3] for key in counted(session.log.path)] == ["bob"]
        assert session.state("eve")["pair"]["key"] == key


def test_a_line_cut_off_anywhere_costs_no_other_choice(folder, capsys):
    with opened(folder) as session:
        for pair in session.supply.pairs[:3]:
            session.choose("ann", pair.key, "tie")
        path = session.log.path
    content = path.read_bytes()
    start = content[:-1].rindex(b"\n") + 1
    for end in range(start, len(content) + 1):
        path.write_bytes(content[:end])
        with opened(folder) as session:
            survived = len(session.log.answers("ann"))
            assert survived == (3 if end >= len(content) - 1 else 2)
            assert ("cut off" in capsys.readouterr().err) == (start < end < len(content) - 1)
            session.choose("ann", session.supply.pairs[5].key, "tie")
        assert len(counted(path)) == survived + 1


def test_a_full_disk_leaves_the_record_as_it_was_and_says_so(folder, monkeypatch):
    with opened(folder) as session:
        first, second = (pair.key for pair in session.supply.pairs[:2])
        session.choose("ann", first, "left")
        before = session.log.path.read_bytes()

        def full(descriptor):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(DataError, match="No space left on device; make room, then choose again"):
                session.choose("ann", second, "left")
        assert session.log.path.read_bytes() == before
        assert session.state("ann")["pair"]["key"] == second
        assert session.choose("ann", second, "left")["chosen"] == 2


def test_a_record_has_one_writer(folder):
    with opened(folder), pytest.raises(ConfigError, match="another process writes to"):
        ChoiceLog(folder)


FIELDS = '{"image_0": "a", "image_1": "b", "prompt": "c", "annotator": "d", "choice": '


@pytest.mark.parametrize("line", ["no json", "[]", '{"choice": 1}', FIELDS + "2}", FIELDS + "true}"])
def test_a_record_that_holds_something_else_is_refused_and_left_alone(folder, line):
    (folder / "choices.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match="choices.jsonl, line 1: "):
        ChoiceLog(folder)
    assert (folder / "choices.jsonl").read_text() == line + "\n"


@pytest.mark.parametrize("name", ["", "  ", "x" * 65, "a\nb", "\ud800", None, 3])
def test_a_name_is_short_and_printable(name):
    with pytest.raises(ConfigError, match="a name has 1 to 64 printable characters"):
        checked_name(name)
    assert checked_name(" Ann Müller ") == "Ann Müller"


# ------------------------------------------------------------------------------------------ pairs


def table_of(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def forms(tmp_path: Path) -> dict[str, Path]:
    """The same two pairs in every form that is read."""
    endings, two = tmp_path / "endings", tmp_path / "two"
    for stem, number in (("x", 0), ("y.z", 1)):
        for i, (ending, model) in enumerate(zip("ab", ("base", "tuned"))):
            paint(endings / f"{stem}.{ending}.png", (number, 100 * i, 0))
            paint(two / model / f"{stem}.png", (number, 100 * i, 0))
        (endings / f"{stem}.txt").write_text(f"prompt {number}\n")
        (two / "base" / f"{stem}.txt").write_text(f"prompt {number}\n")
    predict, tables = tmp_path / "predict", tmp_path / "tables"
    files = [paint(predict / f"{n:05d}_{i:02d}.png", (n, 100 * i, 0)).name for n in (0, 1) for i in (0, 1)]
    entries = [{"file": file, "prompt": f"prompt {n // 2}"} for n, file in enumerate(files)]
    (predict / "pictures.json").write_text(json.dumps(entries))
    tables.mkdir()
    lines = [(f"../predict/{files[2 * n]}", str(predict / files[2 * n + 1]), f"prompt {n}") for n in (0, 1)]
    objects = [json.dumps(dict(zip(("image_0", "image_1", "prompt"), line))) for line in lines]
    return {
        "endings": endings,
        "two folders": two,
        "predict": predict,
        "jsonl": table_of(tables, "a.jsonl", "\n".join(objects) + "\n"),
        "csv": table_of(tables, "a.csv", "\n".join(map(",".join, [("image_0", "image_1", "prompt"), *lines]))),
    }


@pytest.mark.parametrize("form", ["endings", "two folders", "predict", "jsonl", "csv"])
def test_every_form_gives_its_pairs(tmp_path, form):
    place = forms(tmp_path)[form]
    pairs = read_pairs(place, tmp_path / "record")
    assert [pair.prompt for pair in pairs] == ["prompt 0", "prompt 1"]
    for number, pair in enumerate(pairs):
        pixels = [Image.open(path).getpixel((0, 0)) for path in (pair.image_0, pair.image_1)]
        assert pixels == [(number, 0, 0), (number, 100, 0)]


def test_paths_in_the_record_count_from_its_folder(tmp_path):
    place = forms(tmp_path)["endings"]
    assert read_pairs(place, place)[0].image_0 == "x.a.png"
    assert read_pairs(place, tmp_path)[0].image_1 == "endings/x.b.png"


def test_what_is_not_shown_is_told(tmp_path, capsys):
    made = forms(tmp_path)
    place, table = made["endings"], made["jsonl"]
    paint(place / "grid.png")
    read_pairs(place, place)
    assert "note: 1 pictures in" in capsys.readouterr().err
    table.write_text(table.read_text() * 2)
    assert len(read_pairs(table, tmp_path)) == 2
    assert "note: 2 rows of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "missing", "does not exist; --pairs wants"),
        (lambda d: d, "holds no pairs of pictures; known forms"),
        (lambda d: paint(d / "a.png"), "could be read; known forms"),
        (
            lambda d: paint(d / "a_0.png") and paint(d / "a_1.png") and d,
            r"the prompt of .*a_0 is missing; write it into",
        ),
        (lambda d: paint(d / "a_0.png") and paint(d / "a_0.jpg") and d, "have one stem"),
        (lambda d: table_of(d, "a.jsonl", "{"), "line 1: not valid JSON"),
        (lambda d: table_of(d, "a.jsonl", '{"image_0": "x.png"}'), "line 1: has the fields image_0, expected texts"),
        (lambda d: table_of(d, "a.csv", "image_0,image_1,prompt\nx.png,y.png,z"), "x.png does not exist; paths count"),
        (lambda d: table_of(d, "a.csv", "image_0,image_1,prompt\n/etc/passwd,y.png,z"), "is no picture; known are"),
        (lambda d: table_of(d, "pictures.json", "{}").parent, "expected a list of"),
        (lambda d: table_of(d, "a.parquet", "x"), "is no intact parquet file"),
        (lambda d: table_of(d, "a.csv", "image_0,image_1,prompt"), "holds no pairs of pictures"),
    ],
)
def test_what_holds_no_pairs_is_one_line(tmp_path, make, message):
    with pytest.raises(DataError, match=message):
        label.main([f"--pairs={make(tmp_path)}", "--port=0"])
    assert not (tmp_path / "choices.jsonl").exists()


def test_one_picture_per_prompt_says_how_to_draw_two(tmp_path):
    entries = [{"file": paint(tmp_path / f"{n}.png").name, "prompt": f"prompt {n}"} for n in range(2)]
    (tmp_path / "pictures.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match="images_per_prompt=2"):
        read_pairs(tmp_path, tmp_path)


def test_rows_of_parquet_are_unpacked_as_they_are(tmp_path):
    content = rows(5)
    source = ParquetPairs(
        [write_parquet(tmp_path / "a.parquet", content[:3]), write_parquet(tmp_path / "b.parquet", content[3:])],
        tmp_path,
    )
    assert source.total == 5
    stop = threading.Event()
    pairs = [source.pair(number, stop) for number in (4, 0, 1, 2)]
    assert [pair.prompt for pair in pairs] == ["caption 4", "caption 0", "caption 1", "caption 2"]
    assert (tmp_path / pairs[0].image_0).read_bytes() == content[4]["jpg_0"]
    assert pairs[0].image_0.endswith("0000004_0.jpg")
    assert pairs[0].image_1.endswith("0000004_1.png")
    again = ParquetPairs([tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path)
    assert [again.ready(number) for number in range(5)] == [True, True, True, False, True]


# ------------------------------------------------------------------------------------------ supply


class Slow(PairSource):
    """Makes pairs at once, up to one that fails or never ends."""

    total = 50

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure

    def ready(self, number: int) -> bool:
        return number < 2

    def pair(self, number: int, stop: threading.Event) -> PicturePair:
        if number == 30 and self.failure is not None:
            raise self.failure
        if number == 30:
            stop.wait()
            raise Stopped
        return PicturePair(f"{number}_0.png", f"{number}_1.png", "x")


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_pairs_are_made_as_far_ahead_as_asked_and_no_farther():
    supply = Supply(Slow(), ahead=4)
    assert len(supply.pairs) == 2
    supply.start()
    until(lambda: len(supply.pairs) == 5)
    supply.reached(10)
    until(lambda: len(supply.pairs) == 15)
    time.sleep(0.1)
    assert len(supply.pairs) == 15
    supply.reached(40)
    until(lambda: len(supply.pairs) == 30)
    supply.close()  # the pair that is being made is given up
    assert len(supply.pairs) == 30
    assert supply.problem is None


@pytest.mark.parametrize(
    ("failure", "told"), [(DataError("no room"), "no room"), (RuntimeError("CUDA\nout"), "RuntimeError: CUDA out")]
)
def test_a_failure_is_told_and_what_is_ready_stays(tmp_path, failure, told, capsys):
    supply, log = Supply(Slow(failure), ahead=100), ChoiceLog(tmp_path)
    supply.start()
    until(lambda: supply.problem is not None)
    supply.close()
    state = Session(supply, log, 0).state("ann")
    log.close()
    assert (state["problem"], state["ready"], state["total"]) == (told, 30, 50)
    assert told.split(": ")[-1].split()[0] in capsys.readouterr().err


@pytest.fixture
def drawn(tmp_path):
    """``drawn("out", seed=1)``: pairs by the embedded model in two steps."""
    from experiments.labelling.drawing import drawn_pairs

    def make(output="out", prompts=("one small red circle on a black background", "三"), seed=0, steps=2):
        words = [f"--sampler.steps={steps}", "--sampler.guidance_scale=2"]
        return drawn_pairs("dpo_tiny", prompts, 2, seed, tmp_path / output, words)

    return make


def test_drawn_pairs_depend_on_seed_and_number_alone_and_are_drawn_once(tmp_path, drawn):
    stop = threading.Event()
    source, other = drawn(), drawn("other")
    assert source.total == 4
    pairs = [source.pair(number, stop) for number in (0, 1, 2)]
    assert [pair.prompt for pair in pairs] == ["one small red circle on a black background", "三", pairs[0].prompt]
    assert pairs[0].image_0 == "pictures/000000_one-small-red-circle-on-a-black-backgrou_0.png"
    assert pairs[1].image_1 == "pictures/000001_1.png"

    def pixels(folder, pair):
        return [np.asarray(Image.open(tmp_path / folder / path)) for path in (pair.image_0, pair.image_1)]

    first, third = pixels("out", pairs[0]), pixels("out", pairs[2])
    assert all((one != two).any() for one, two in ((first[0], first[1]), (first[0], third[0])))
    assert np.array_equal(pixels("other", other.pair(2, stop)), third)

    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out" / "pictures").iterdir())]
    again = drawn()
    assert [again.ready(number) for number in range(4)] == [True, True, True, False]
    assert again.pair(1, stop) == pairs[1]
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "out" / "pictures").iterdir())] == times


def test_a_folder_of_another_job_is_refused(tmp_path, drawn):
    drawn()
    for change, name in (({"seed": 1}, "seed"), ({"steps": 3}, "sampler"), ({"prompts": ["x"]}, "prompts")):
        with pytest.raises(ConfigError, match=f"was begun with another {name} "):
            drawn(**change)
    (tmp_path / "full" / "pictures").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds pictures of something else"):
        drawn("full")


def test_drawing_stops_within_a_picture_and_refuses_numbers_that_are_not_finite(tmp_path, drawn, monkeypatch):
    source, stop = drawn(), threading.Event()
    monkeypatch.setattr(source._policy, "decode", lambda latents: latents.new_full((2, 3, 8, 8), float("nan")))
    with pytest.raises(UserError, match="pictures are not finite numbers"):
        source.pair(0, stop)
    stop.set()
    with pytest.raises(Stopped):
        source.pair(0, stop)
    assert not (tmp_path / "out" / "pictures").exists()


# ------------------------------------------------------------------------------------------ server


@contextmanager
def serving(session: Session, token: str | None = None):
    """The real server in a thread; yields its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(application(session, token), log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def fetch(address, body=None, headers=None, kind="application/json"):
    """Status, headers and bytes."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": kind} if data is not None else {}
    request = urllib.request.Request(address, data, given | (headers or {}))
    try:
        with urllib.request.build_opener(NoRedirect).open(request) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        return None


def test_the_addresses_show_what_the_session_says(folder):
    with opened(folder) as session, serving(session) as base:
        status, _, body = fetch(f"{base}/state?annotator=ann")
        state = json.loads(body)
        assert (status, state["total"], state["chosen"]) == (200, 20, 0)
        left = fetch(f"{base}/{state['pair']['left']}")
        assert left[1]["content-type"] == "image/png"
        assert left[2] == session.picture(state["pair"]["key"], "left").read_bytes()
        body = {"annotator": "ann", "pair": state["pair"]["key"], "answer": "tie"}
        assert json.loads(fetch(f"{base}/choice", body)[2])["chosen"] == 1
        assert list(counted(session.log.path).values()) == ["tie"]
        assert json.loads(fetch(f"{base}/undo", {"annotator": "ann", "pair": body["pair"]})[2])["chosen"] == 0


def test_nothing_that_a_browser_is_told_names_a_picture(folder):
    with opened(folder) as session, serving(session) as base:
        state = json.loads(fetch(f"{base}/state?annotator=ann")[2])
        shown = json.dumps([state["pair"], state["next"]])
        assert "png" not in shown
        assert "_0" not in shown


def test_only_the_pictures_of_pairs_can_be_read(folder, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    with opened(folder) as session, serving(session) as base:
        key = session.supply.pairs[0].key
        for path in (
            "../secret.png", "..%2fsecret.png", "picture/../../secret.png", f"picture/{key}/../../../secret.png",
            f"picture/{key}/..%2f..%2fsecret.png", "picture/..%2f..%2fsecret.png/left", "picture/0/left",
            f"picture/{key}/0", "page.html", "server.py", "choices.jsonl", "page.js/..%2fserver.py", "docs",
        ):  # fmt: skip
            status, _, body = fetch(f"{base}/{path}")
            assert status in (400, 404)
            assert b"secret" not in body


def test_a_picture_that_was_deleted_is_not_found(folder):
    with opened(folder) as session, serving(session) as base:
        (folder / "pair000_0.png").unlink()
        key = session.supply.pairs[0].key
        statuses = {fetch(f"{base}/picture/{key}/{side}")[0] for side in ("left", "right")}
        assert statuses == {200, 404}


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"annotator": "ann"}', b'{"annotator": 1, "pair": "x", "answer": "tie"}']
)
def test_a_body_that_is_no_choice_is_refused(folder, body):
    with opened(folder) as session, serving(session) as base:
        assert fetch(f"{base}/choice", body)[0] == 400
        assert session.log.path.stat().st_size == 0


def test_a_foreign_page_can_neither_choose_nor_read(folder):
    with opened(folder) as session, serving(session) as base:
        body = {"annotator": "ann", "pair": session.supply.pairs[0].key, "answer": "tie"}
        assert fetch(f"{base}/choice", body, kind="text/plain")[0] == 400  # all that a form can send unasked
        assert fetch(f"{base}/state?annotator=ann", headers={"Host": "evil.example"})[0] == 403
        for name in ("localhost", "127.0.0.1", "[::1]"):
            assert fetch(f"{base}/", headers={"Host": f"{name}:1"})[0] == 200
        assert (
            "access-control-allow-origin" not in fetch(f"{base}/state?annotator=ann", headers={"Origin": "http://e"})[1]
        )
        assert session.log.path.stat().st_size == 0
        policy = fetch(f"{base}/")[1]["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "http" not in policy


def test_with_a_token_only_who_knows_it_gets_in(folder):
    with opened(folder) as session, serving(session, "a-token") as base:
        for path in (
            "",
            "page.js",
            "state?annotator=ann",
            f"picture/{session.supply.pairs[0].key}/left",
            "?token=other",
        ):
            assert fetch(f"{base}/{path}")[0] == 403
        assert (
            fetch(f"{base}/choice", {"annotator": "a", "pair": session.supply.pairs[0].key, "answer": "tie"})[0] == 403
        )
        status, headers, _ = fetch(f"{base}/?token=a-token&annotator=ann", headers={"Host": "my-server:1"})
        assert (status, headers["location"]) == (303, "./?annotator=ann")
        cookie = headers["set-cookie"]
        assert "HttpOnly" in cookie
        port = base.rpartition(":")[2]
        for given, expected in ((f"label_token_{port}=a-token", 200), (f"label_token_{port}=b-token", 403)):
            assert fetch(f"{base}/state?annotator=ann", headers={"Cookie": given})[0] == expected


# ------------------------------------------------------------------------------------------ command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "want --pairs PLACE to choose from, or --config"),
        (["--pairs=.", "--config=dpo_tiny"], "one of the two"),
        (["--config=dpo_tiny"], "--config NAME and --prompts FILE go together"),
        (["--pairs=.", "--prompts=x.txt"], "--config NAME and --prompts FILE go together"),
        (["--pairs=.", "--sampler.steps=3"], "'--sampler.steps=3' does not exist here"),
        (["--pairs=.", "--seeed=3"], "'--seeed=3' does not exist here"),
        (["--pairs=.", "--seed=x"], "argument --seed: invalid int value: 'x'"),
        (["--pairs=.", "--ahead=0"], "--ahead of at least 1"),
        (["--pairs=.", "--port=70000"], "--port 70000 is none"),
        (["--pairs=.", "--host=192.0.2.1", "--port=0"], "cannot listen on 192.0.2.1"),
    ],
)
def test_a_mistake_is_one_line(words, message):
    with pytest.raises(ConfigError, match=message) as caught:
        label.main(words)
    assert "\n" not in str(caught.value)


def test_a_port_that_is_taken_is_one_line(folder):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}: .*in use; give another --port"):
            label.main([f"--pairs={folder}", f"--port={port}"])


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_without_the_package_it_says_what_to_install(folder, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs the package {package}; pip install -e '\.\[label\]'"):
        label.main([f"--pairs={folder}"])


def test_other_machines_need_a_token():
    assert [label._is_local(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost")] == [True] * 4
    assert not any(map(label._is_local, ("0.0.0.0", "::", "192.168.0.3", "my-server", "")))


@contextmanager
def command(*words):
    """``experiments.label`` in a process of its own; yields it and its address."""
    started = subprocess.Popen([sys.executable, "-m", "experiments.label", *map(str, words)],
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    try:
        line = started.stdout.readline()
        assert line.startswith("choose at http://"), line
        yield started, line.split()[2]
    finally:
        started.kill()
        started.wait()
        started.stdout.close()


def test_a_signal_ends_it_and_the_next_start_has_a_token_where_others_can_reach_it(folder):
    with command("--pairs", folder, "--host=0.0.0.0", "--port=0") as (process, address):
        base, _, token = address.partition("?token=")
        base = base.replace("0.0.0.0", "127.0.0.1")
        assert len(token) >= 20
        assert fetch(f"{base}state?annotator=ann")[0] == 403
        assert fetch(f"{base}?token={token}")[0] == 303
        process.terminate()
        assert process.wait(60) == 143
    with command("--pairs", folder, "--port=0") as (_, address):
        assert fetch(f"{address}state?annotator=ann")[0] == 200


# ------------------------------------------------------------------------------------------ browser


def press(browser, key):
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(key).perform()


def key_of(browser):
    return browser.execute_script("return document.getElementById('prompt').dataset.key || ''")


def ready(browser, before=""):
    """Wait until another pair than ``before`` can be chosen from; returns its key."""
    script = """const button = document.querySelector('footer [data-answer=left]');
        return !document.getElementById('choosing').hidden && !button.disabled"""
    until(lambda: key_of(browser) not in ("", before) and browser.execute_script(script))
    return key_of(browser)


def colours(browser):
    """Red and green of the pictures at the left and at the right, as they are on the screen."""
    return browser.execute_script("""return ['left', 'right'].map((side) => {
        const canvas = document.createElement('canvas');
        canvas.width = canvas.height = 1;
        const context = canvas.getContext('2d');
        context.drawImage(document.querySelector(`#${side} img`), 0, 0, 1, 1);
        return Array.from(context.getImageData(0, 0, 1, 1).data).slice(0, 2);
    })""")


def visible(browser, name):
    return browser.execute_script("return !document.getElementById(arguments[0]).hidden", name)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_twenty_choices_by_keyboard_with_the_server_killed_in_the_middle(browser, folder):
    from selenium.webdriver import Keys

    port, expected, key = free_port(), {}, ""

    def choose(number):
        nonlocal key
        key = ready(browser, key)
        shown = colours(browser)
        assert [red for red, _ in shown] == [number, number]
        side = number % 3 % 2
        expected[f"pair{number:03d}_0.png"] = shown[side][1] // 100
        press(browser, Keys.ARROW_RIGHT if side else Keys.ARROW_LEFT)

    with command("--pairs", folder, f"--port={port}") as (process, address):
        browser.get(address)
        browser.find_element("id", "name").send_keys("ann", Keys.ENTER)
        for number in range(8):
            choose(number)
        process.kill()  # perhaps before the eighth choice has arrived
    time.sleep(0.5)
    arrived = key_of(browser) != key
    if arrived:
        choose(8)  # which nobody receives
    until(lambda: visible(browser, "notice"))
    assert "No connection" in browser.find_element("id", "notice").text
    with command("--pairs", folder, f"--port={port}") as (process, address):
        for number in range(9 if arrived else 8, 14):
            choose(number)
        ready(browser, key)
        process.kill()
    with command("--pairs", folder, f"--port={port}") as (_, address):
        browser.get(f"{address}?annotator=ann")  # a page opened anew
        key = ""
        for number in range(14, 20):
            choose(number)
        until(lambda: visible(browser, "ended"))
        assert browser.find_element("id", "summary").text == "20 chosen, 0 skipped."
    found = counted(folder / "choices.jsonl")
    assert {key[0]: choice for key, choice in found.items()} == expected
    assert len((folder / "choices.jsonl").read_text().splitlines()) == 20


def test_tie_skip_and_undo_by_keyboard_and_a_name_in_the_address(browser, folder):
    from selenium.webdriver import Keys

    with command("--pairs", folder, "--port=0") as (_, address):
        browser.get(f"{address}?annotator=bob")
        keys = [""]
        for answer in (Keys.ARROW_DOWN, "s", "T", Keys.ARROW_LEFT):
            keys.append(ready(browser, keys[-1]))
            press(browser, answer)
        keys.append(ready(browser, keys[-1]))
        assert browser.find_element("id", "count").text == "4 of 20, 1 skipped"
        for key, undo in zip(keys[-2:1:-1], ("u", Keys.BACKSPACE, "U")):
            press(browser, undo)
            until(lambda key=key: key_of(browser) == key)
            ready(browser)
        assert browser.find_element("id", "count").text == "1 of 20"
        browser.find_element("css selector", "footer [data-answer=right]").click()
        ready(browser, keys[2])
        browser.find_element("id", "right").click()  # the picture itself
        ready(browser, keys[3])
    values = list(counted(folder / "choices.jsonl").values())
    assert values[0] == "tie"
    assert all(value in (0, 1) for value in values[1:])
    assert {key[3] for key in counted(folder / "choices.jsonl")} == {"bob"}
    assert len(values) == 3


def test_a_prompt_stays_text_and_nothing_is_asked_of_anybody_else(browser, folder):
    from selenium.webdriver import Keys

    with command("--pairs", folder, "--port=0") as (_, address):
        browser.get_log("performance")
        browser.get_log("browser")
        browser.get(f"{address}?annotator=ann")
        press_first = ready(browser)
        press(browser, Keys.ARROW_LEFT)
        ready(browser, press_first)
        assert browser.find_element("id", "prompt").text == SCRIPT
        assert browser.title == "Which picture is better?"
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        ]
        assert len(asked) >= 8
        assert [url for url in asked if not url.startswith((address, "data:"))] == []
        assert browser.get_log("browser") == []  # no message of the content policy, no error


def test_a_picture_that_cannot_be_shown_leaves_only_skip(browser, folder):
    (folder / "pair000_0.png").write_bytes(b"no picture")
    with command("--pairs", folder, "--port=0") as (_, address):
        browser.get(f"{address}?annotator=ann")
        broken = "return document.querySelectorAll('.picture.broken').length"
        until(lambda: browser.execute_script(broken) == 1)
        for answer in ("left", "tie", "right"):
            assert not browser.find_element("css selector", f"footer [data-answer={answer}]").is_enabled()
        first = key_of(browser)
        press(browser, "s")
        ready(browser, first)
    assert counted(folder / "choices.jsonl") == {}


def test_the_next_pairs_are_drawn_while_one_chooses(browser, tmp_path):
    from selenium.webdriver import Keys

    (tmp_path / "prompts.txt").write_text("\n".join(f"{n} small red circles" for n in range(6)))
    words = ["--config=dpo_tiny", f"--prompts={tmp_path / 'prompts.txt'}", f"--output={tmp_path / 'out'}", "--port=0"]
    with command(*words, "--sampler.steps=2", "--ahead=2") as (process, address):
        browser.get(f"{address}?annotator=ann")
        key = ""
        for number in range(6):
            key = ready(browser, key)
            assert browser.find_element("id", "prompt").text == f"{number} small red circles"
            press(browser, Keys.ARROW_LEFT)
        until(lambda: visible(browser, "ended"))
        process.terminate()
        assert process.wait(60) == 143
    found = counted(tmp_path / "out" / "choices.jsonl")
    assert [key[2] for key in found] == [f"{n} small red circles" for n in range(6)]
    assert all((tmp_path / "out" / path).is_file() for key in found for path in key[:2])
