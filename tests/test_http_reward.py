"""A reward behind HTTP, against real servers on this machine: good ones, slow ones, broken ones, none."""

import base64
import io
import json
import re
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_modules.errors import ConfigError, UserError
from lightning_modules.rewards import http_reward
from lightning_modules.rewards.http_reward import HttpReward
from lightning_modules.rewards.mps import MPS

IMAGES = torch.rand(5, 3, 6, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "bb", "ccc", "日本 <b>", ""]
FAST = {"attempts": 3, "backoff": 0.01}


@contextmanager
def serving(answer):
    """``answer(handler, asked)`` for every POST; the list of what was asked, and the URL."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer(self, asked)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield asked, f"http://127.0.0.1:{server.server_port}/score"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def send(handler, body, status=200):
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def judged(handler, asked):
    """Mean level of the red channel, and a tenth per letter of the prompt."""
    now = asked[-1]
    arrays = [np.array(Image.open(io.BytesIO(base64.b64decode(image)))) for image in now["images"]]
    scores = [float(array[..., 0].mean()) + len(text) / 10 for array, text in zip(arrays, now["prompts"])]
    send(handler, json.dumps({"scores": scores}).encode())


def failing(*statuses):
    """These statuses first, then an answer."""

    def answer(handler, asked):
        if len(asked) <= len(statuses):
            send(handler, b"busy", statuses[len(asked) - 1])
        else:
            judged(handler, asked)

    return answer


EXPECTED = (IMAGES[:, 0] * 255).round().mean(dim=(1, 2)) + torch.tensor([len(text) / 10 for text in PROMPTS])


def test_pictures_and_prompts_arrive_as_saved_pngs_in_batches_and_in_order():
    with serving(judged) as (asked, url):
        scores = HttpReward(url, batch_size=2).score(IMAGES, PROMPTS)
    torch.testing.assert_close(scores, EXPECTED)
    assert [each["prompts"] for each in asked] == [PROMPTS[:2], PROMPTS[2:4], PROMPTS[4:]]
    sent = Image.open(io.BytesIO(base64.b64decode(asked[1]["images"][0])))
    assert (sent.format, sent.mode, sent.size) == ("PNG", "RGB", (8, 6))
    assert np.array_equal(np.array(sent), (IMAGES[2] * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("statuses", [(500,), (503, 502), (429, 500)])
def test_a_busy_or_broken_server_is_tried_again_after_longer_and_longer(statuses, monkeypatch):
    waits = []
    monkeypatch.setattr(http_reward.time, "sleep", waits.append)
    with serving(failing(*statuses)) as (asked, url):
        scores = HttpReward(url, attempts=3, backoff=2.0).score(IMAGES, PROMPTS)
    torch.testing.assert_close(scores, EXPECTED)
    assert len(asked) == len(statuses) + 1
    assert waits == [2.0, 4.0][: len(statuses)]


def test_as_many_attempts_as_asked_for_and_no_more():
    with serving(failing(500, 500, 500, 500)) as (asked, url):
        with pytest.raises(UserError, match=r"answered with status 500 \(busy\), 3 times; see what") as error:
            HttpReward(url, **FAST).score(IMAGES, PROMPTS)
        assert len(asked) == 3
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 301])
def test_a_refusal_is_not_tried_again(status):
    with serving(failing(status)) as (asked, url):
        with pytest.raises(UserError, match=rf"reward judge: http://\S+/score answered with status {status} \(busy\);"):
            HttpReward(url, name="judge", **FAST).score(IMAGES, PROMPTS)
        assert len(asked) == 1


def test_a_server_that_is_down_is_one_clear_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=r"cannot be reached \(.*refused.*\), 3 times; start the server") as error:
        HttpReward(f"http://127.0.0.1:{port}/score", **FAST).score(IMAGES, PROMPTS)
    assert "\n" not in str(error.value)


def test_a_server_that_hangs_up_is_tried_again():
    def answer(handler, asked):
        if len(asked) == 1:
            handler.close_connection = True
        else:
            judged(handler, asked)

    with serving(answer) as (asked, url):
        torch.testing.assert_close(HttpReward(url, **FAST).score(IMAGES, PROMPTS), EXPECTED)
    assert len(asked) == 2


def silent(handler, asked):
    time.sleep(0.6)
    handler.close_connection = True


def dripping(handler, asked):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(20):
        try:
            handler.wfile.write(b" ")
        except OSError:
            return
        time.sleep(0.03)


@pytest.mark.parametrize("answer", [silent, dripping])
def test_a_server_that_is_slow_is_one_clear_line(answer):
    with serving(answer) as (asked, url):
        with pytest.raises(UserError, match=r"gave no answer within 0.2 s, 2 times; raise timeout"):
            HttpReward(url, timeout=0.2, attempts=2, backoff=0.0).score(IMAGES, PROMPTS)
        assert len(asked) == 2


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"<html>\nhello</html>", r"answered no JSON \(<html> hello</html>\)"),
        (b"", r"answered no JSON \(nothing\)"),
        (b"[" * 100_000, "answered no JSON"),
        (b"\xff\xfe", "answered no JSON"),
        (b"[1, 2, 3, 4, 5]", 'answered without "scores"'),
        (b'{"score": 1}', 'answered without "scores"'),
        (b'{"scores": [1, 2, 3]}', "answered 3 scores for 5 pictures"),
        (b'{"scores": [1, 2, 3, 4, NaN]}', "gave the score 'nan'"),
        (b'{"scores": [1, 2, 3, 4, -Infinity]}', "gave the score '-inf'"),
        (b'{"scores": [1, 2, 3, 4, 1e39]}', r"gave the score '1e\+39'"),
        (b'{"scores": [1, 2, 3, 4, 1' + b"0" * 400 + b"]}", "gave the score '10000"),
        (b'{"scores": [1, 2, 3, 4, "5"]}', "gave the score '5'"),
        (b'{"scores": [1, 2, 3, 4, true]}', "gave the score 'True'"),
        (b'{"scores": [1, 2, 3, 4, null]}', "gave the score 'None'"),
        (b" " * (1024 * 1024 + 1), "answers more than 1048576 bytes"),
    ],
)
def test_rubbish_is_one_clear_line_and_not_asked_for_again(body, told):
    with serving(lambda handler, asked: send(handler, body)) as (asked, url):
        with pytest.raises(UserError, match=told) as error:
            HttpReward(url, **FAST).score(IMAGES, PROMPTS)
        assert len(asked) == 1
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_whole_numbers_are_scores():
    with serving(lambda handler, asked: send(handler, b'{"scores": [1, -2, 0, 1e30, 0.5]}')) as (_, url):
        assert HttpReward(url).score(IMAGES, PROMPTS).tolist() == pytest.approx([1, -2, 0, 1e30, 0.5])


def test_it_says_what_it_asks_and_keeps_keys_to_itself():
    reward = HttpReward("https://judge.example:8443/v1/score?key=secret", name="vlm", version="judge 2")
    assert reward.described() == {
        "name": "vlm",
        "class": "lightning_modules.rewards.http_reward.HttpReward",
        "version": "judge 2",
        "url": "https://judge.example:8443/v1/score",
        "preprocessing": {"family": "png", "rounded_to_8_bit": "first"},
    }
    with serving(failing(404)) as (_, url), pytest.raises(UserError) as error:
        HttpReward(f"{url}?key=secret").score(IMAGES, PROMPTS)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"url": "judge:8000"},
        {"url": "file:///etc/passwd"},
        {"url": "http://me:secret@judge/"},
        {"url": "http://["},
        {"batch_size": 0},
        {"attempts": 0},
        {"timeout": 0.0},
        {"timeout": float("nan")},
        {"backoff": -1.0},
    ],
)
def test_settings_without_meaning_are_refused(settings):
    with pytest.raises(ConfigError, match="HttpReward"):
        HttpReward(**({"url": "http://judge/"} | settings))


def test_the_example_server_of_the_page_answers(monkeypatch):
    """The code of docs/extend.md, as it stands there."""
    page = (Path(__file__).parent.parent / "docs" / "extend.md").read_text()
    code = re.search(r"```python\n(# my_judge\.py.*?)```", page, re.DOTALL)[1]
    space = {"__name__": "my_judge"}
    exec(code, space)
    server = ThreadingHTTPServer(("127.0.0.1", 0), space["Handler"])
    monkeypatch.setattr(space["Handler"], "log_message", lambda *_: None)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        grey = torch.stack([torch.full((3, 4, 4), level) for level in (0.0, 0.2, 1.0)])
        scores = HttpReward(f"http://127.0.0.1:{server.server_port}/").score(grey, ["a", "b", "c"])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert scores.tolist() == pytest.approx([0.0, 0.2, 1.0])


def test_mps_is_refused_by_name_with_the_reason():
    with pytest.raises(ConfigError, match="MPS: its weights are published only as a pickled module, .* HttpReward$"):
        MPS("somewhere")
