"""Shapes in signatures are checked while the tests run; no test reaches the network."""

import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Some tests fork: without threads of libraries, whose locks a child would keep for ever.
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
# lightning 2.6 calls jsonargparse's former name for instantiating
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

import pytest
import torch
from jaxtyping import install_import_hook
from safetensors.torch import load_file
from tqdm import tqdm

tqdm.monitor_interval = 0

TESTS = Path(__file__).parent
CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")


def pytest_addoption(parser):
    add = parser.getgroup("benchmarks", "what tests/benchmarks run at").addoption
    add(
        "--size",
        choices=("tiny", "mid", "sd15", "sdxl"),
        default="tiny",
        help="of networks and work; tiny shows nothing",
    )
    add("--device", default="cpu", help="cpu, whose CPU time is counted, or cuda")
    add("--rounds", type=int, help="how often each way is timed, in turn (5; tiny 1)")
    add("--results", help="JSON file that takes the rows; performance_page.py makes docs/performance.md of it")


def pytest_configure(config):
    if config.getoption("--size") == "tiny":  # what is timed for its numbers runs as it does in production
        install_import_hook(["lightning_modules", "datamodules", "callbacks", "experiments"], "beartype.beartype")
    import experiments  # noqa: F401  # hands in where packaged files are


@pytest.fixture(autouse=True)
def one_thread():
    """Tests run side by side on few cores; and fp32 sums don't depend on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture
def handlers():
    """No signal handler of a run outlives it; SIGHUP is not ignored, as it is where nohup started the tests."""
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before
    signal.signal(signal.SIGHUP, inherited)


@pytest.fixture(scope="session")
def golden():
    """Known answers made by the papers' official code: ``golden("dpo_loss")`` is a dict of tensors."""
    return lambda name: load_file(TESTS / "golden" / f"{name}.safetensors")


@pytest.fixture(scope="session")
def pipelines():
    """The folder of the tiny random-weight pipelines: tiny-sd15, tiny-sdxl, tiny-pickscore, tiny-spm."""
    return TESTS / "pipelines"


@pytest.fixture(scope="session")
def harness():
    """What starts processes in the state of a fresh interpreter that has imported everything."""
    from kill_harness import Harness

    with Harness() as started:
        yield started


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium that keeps what it asked for and what it complained of; skips where there is none."""
    if not (CHROMIUM.exists() and DRIVER.exists()):
        pytest.skip(f"needs a browser: {CHROMIUM} and {DRIVER} (apt-get install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1366,768"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()
