"""What benchmarks run at, and where their rows go: ``--size``, ``--device``, ``--rounds`` and ``--results``."""

import json
import platform
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import pytest
import torch
from alternating import Clock, Timings
from networks import SIZES, build


@dataclass
class Rows:
    """Of docs/performance.md: numbers by name, in the order in which they were measured."""

    size: str
    device: str
    rounds: int
    rows: dict[str, dict[str, object]] = field(default_factory=dict)

    def ratio(self, name: str, timings: Timings, slow: str, fast: str, **more: object) -> None:
        """How many times as fast ``fast`` is as ``slow``, with the seconds of both."""
        self.add(name, peer=slow, ratio=timings.ratios(slow, fast), peer_seconds=timings.spread(slow),
                 own_seconds=timings.spread(fast), **more)  # fmt: skip

    def add(self, name: str, **numbers: object) -> None:
        self.rows[name] = numbers
        print(f"\n{name}: " + ", ".join(f"{key} {_shown(value)}" for key, value in numbers.items()), flush=True)


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return " / ".join(f"{part:.4g}" for part in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@pytest.fixture(scope="session")
def size(request):
    return SIZES[request.config.getoption("--size")]


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def clock(device):
    return Clock(device)


@pytest.fixture(scope="session")
def rounds(request):
    asked = request.config.getoption("--rounds")
    return asked or (1 if request.config.getoption("--size") == "tiny" else 5)


@pytest.fixture(scope="session")
def rows(request, device, rounds):
    found = Rows(request.config.getoption("--size"), device, rounds)
    yield found
    if (file := request.config.getoption("--results")) and found.rows:
        gathered = json.loads(Path(file).read_text()) if Path(file).exists() else {}
        machine = torch.cuda.get_device_name() if device != "cpu" else f"CPU ({platform.machine()}), one thread"
        context = {"size": found.size, "device": machine, "rounds": rounds, "date": str(date.today()),
                   "torch": torch.__version__}  # fmt: skip
        gathered |= {name: {**row, **context} for name, row in found.rows.items()}
        Path(file).write_text(json.dumps(gathered, indent=1) + "\n")


@pytest.fixture(scope="session")
def networks(size, tmp_path_factory):
    """A folder with the pipeline ``sd`` and the judge ``judge``."""
    folder = tmp_path_factory.mktemp("networks")
    build(size, folder / "built")
    return folder / "built"


def pytest_collection_modifyitems(items):
    """A full-size row takes as long as it takes."""
    for item in items:
        if Path(__file__).parent in item.path.parents and item.config.getoption("--size") != "tiny":
            item.add_marker(pytest.mark.timeout(0))
