"""Freed memory stays with a command's process: what is allocated next is not cleared by the system again."""

import json
import os
import platform
import resource
import subprocess
import sys

import pytest

from experiments.cli.workers import in_parallel

# Page faults of a large block that is freed and allocated again, ten times over.
FAULTS = """
import json, resource
from experiments.cli.command import run_command
from experiments.cli.freed_memory import keep_freed_memory

def faults():
    for _ in range(10):  # holes of the right size are found after a few
        b"x" * 2**26
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        b"x" * 2**26
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's malloc that is set")


def told(script, **environment):
    command = [sys.executable, "-c", FAULTS + script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    return json.loads(done.stdout)


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
    ((_, spent),) = in_parallel(faults_of_a_worker, ["job"], 1, [], "nothing")
    assert spent <= 10


def faults_of_a_worker(job):
    for _ in range(10):  # holes of the right size are found after a few
        b"x" * 2**26
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        b"x" * 2**26
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
