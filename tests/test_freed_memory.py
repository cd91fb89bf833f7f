"""Freed memory stays with a command's process: what is allocated next is not cleared by the system again."""

import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.cli.workers import in_parallel

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's malloc that is set")


def faults(job=None):
    """Pages that ten blocks of 64 MiB, each allocated and freed, have from the system."""
    for _ in range(10):  # holes of the right size are found after a few
        b"x" * 2**26
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        b"x" * 2**26
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


IMPORTS = """
import json
from experiments.cli.command import run_command
from experiments.cli.freed_memory import keep_freed_memory
from test_freed_memory import faults
"""


def told(script, **environment):
    """What a process of its own prints."""
    command = [sys.executable, "-c", IMPORTS + script]
    here, variables = Path(__file__).parent, os.environ | environment
    return json.loads(subprocess.run(command, capture_output=True, check=True, cwd=here, env=variables).stdout)


def test_a_command_allocates_what_it_has_freed_without_new_pages():
    before, inside = told("before = faults(); run_command(lambda: print(json.dumps([before, faults()])))")
    assert inside <= 10
    assert before > 10 * 16  # pages of 2 MiB at the least


def test_larger_blocks_and_ends_than_asked_for_go_back():
    small, large = told(
        "keep_freed_memory(2**20, 2**20); small = faults(); keep_freed_memory(2**29, 2**30); faults();"
        "print(json.dumps([small, faults()]))"
    )
    assert large <= 10 < small


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_who_has_set_it_is_left_alone(name):
    value = "glibc.malloc.check=0" if name == "GLIBC_TUNABLES" else str(2**20)
    done, spent = told("print(json.dumps([keep_freed_memory(), faults()]))", **{name: value})
    assert not done
    assert spent > 10 * 16


def test_workers_keep_theirs():
    ((_, spent),) = in_parallel(faults, ["job"], 1, [], "nothing")
    assert spent <= 10
