"""What a run says to SLURM when it is told to end: put its job back into the queue, unless it was cancelled."""

from __future__ import annotations

import os
import re
import subprocess

SCONTROL_SECONDS = 20.0  # for each call: the time until SLURM kills a job is short, and its controller may be busy


def slurm_job() -> str | None:
    """This process's SLURM job as ``scontrol`` names it, or None outside SLURM."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if task is not None and "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"
    return os.environ.get("SLURM_JOB_ID")


def requeue() -> str | None:
    """Give this SLURM job back to the queue, unless it was cancelled; what came of it, or None outside SLURM."""
    job = slurm_job()
    if job is None:
        return None
    # scancel, too, sends SIGTERM, and SLURM would requeue even a cancelled job. Until its processes have left it is
    # COMPLETING, as is a job that SLURM has preempted and requeued itself, and one that had no warning of its time
    # limit. A job within its time to leave is RUNNING.
    answer = _scontrol("show", "job", "--oneliner", job)
    state = re.search(r"\bJobState=(COMPLETING|CANCELLED)\b(?! Reason=TimeLimit)", answer.stdout)
    if state is not None:
        return f"SLURM job {job} was cancelled or preempted ({state[1]}): not requeued by this run"
    answer = _scontrol("requeue", job)
    if answer.returncode == 0:
        return f"requeued SLURM job {job}"
    reason = " ".join((answer.stderr or answer.stdout).split()) or f"scontrol ended with {answer.returncode}"
    return f"could not requeue SLURM job {job}: {reason}; submit it again with --ckpt_path auto"


def _scontrol(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["scontrol", *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=SCONTROL_SECONDS)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer in {SCONTROL_SECONDS:.0f} seconds")
    except OSError as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
