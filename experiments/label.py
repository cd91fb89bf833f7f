"""A local page to choose on: two pictures of one prompt, the better one by a key.

    python -m experiments.label --pairs data/pictures
    python -m experiments.label --config dpo_sd15 --prompts data/prompts.txt --output data/choices
    python -m experiments.prepare_pairs --input data/choices/choices.jsonl --output data/pairs

The first shows pairs that exist, the second lets an experiment's policy draw them, the next ones while one chooses.
Every choice is on disk before the next pair is shown, in ``choices.jsonl`` (its form is told in
``experiments/labelling/choices.py``); the same command again resumes. Several people choose at once, each under a name.
The page is reached from this machine alone; with another ``--host`` its address holds a token, and whoever has the
address can choose.

Keys: left and right arrow choose, down or T is a tie, S skips, U or Backspace takes back.
"""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import secrets
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from datamodules.prompts import prompt_texts
from experiments.cli.command import run_command
from experiments.labelling.choices import ChoiceLog
from experiments.labelling.pairs import read_pairs
from experiments.labelling.session import Session
from experiments.labelling.supply import ListedPairs, PairSource, Supply
from lightning_modules.errors import ConfigError, DataError


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists all settings")


def _parser() -> argparse.ArgumentParser:
    summary = (__doc__ or "").splitlines()[0]
    parser = _Parser(prog="python -m experiments.label", description=summary, allow_abbrev=False)
    add = parser.add_argument
    add("--pairs", type=Path, metavar="PLACE", help="table or folder of pairs, folder of predict or prepare_feedback")
    add("--config", metavar="NAME", help="experiment whose policy draws the pairs, as for run; takes --sampler.* too")
    add("--prompts", metavar="FILE", help="prompts to draw, in any form that run reads")
    add("--pairs_per_prompt", type=int, default=1, metavar="N", help="pairs to draw per prompt (1)")
    add("--ahead", type=int, default=16, metavar="N", help="pairs to keep ready ahead of the one that is shown (16)")
    add("--output", type=Path, metavar="DIR", help="folder of choices.jsonl (that of --pairs, or data/choices/CONFIG)")
    add("--seed", type=int, default=0, help="seed of the sides and of drawn pictures (0)")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in, with a token")
    add("--port", type=int, default=7777, help="port to listen on; 0 takes a free one (7777)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page until a signal comes.

    Raises:
        UserError: something that the user can mend; the command line shows it as one line.
    """
    args, rest = _parser().parse_known_args(argv)
    _check(args, rest)
    with _listener(args.host, args.port) as listener:
        source, folder = _source(args, rest)
        log = ChoiceLog(folder)
        supply = Supply(source, args.ahead)
        token = None if _is_local(args.host) else secrets.token_urlsafe(16)
        try:
            supply.start()
            _serve(Session(supply, log, args.seed), listener, args.host, token)
        finally:
            supply.close()
            log.close()


def _check(args: argparse.Namespace, rest: Sequence[str]) -> None:
    if (args.pairs is None) == (args.config is None):
        raise ConfigError("want --pairs PLACE to choose from, or --config NAME --prompts FILE to draw, one of the two")
    if (args.config is None) != (args.prompts is None):
        raise ConfigError("--config NAME and --prompts FILE go together: the first draws what the second says")
    unknown = [word for word in rest if args.config is None or not word.startswith("--sampler.")]
    if unknown:
        raise ConfigError(f"setting {unknown[0]!r} does not exist here; --help lists all settings")
    if not 0 <= args.port < 2**16:
        raise ConfigError(f"--port {args.port} is none; ports are 0 to 65535")
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"the page needs the package {package}; pip install -e '.[label]'")
    if args.pairs_per_prompt < 1 or args.ahead < 1:
        raise ConfigError("want --pairs_per_prompt of at least 1 and --ahead of at least 1")


def _source(args: argparse.Namespace, rest: Sequence[str]) -> tuple[PairSource, Path]:
    """Where the pairs come from, and the folder of the record."""
    if args.config is not None:
        prompts = list(dict.fromkeys(prompt_texts(args.prompts)))
        folder = _absolute(args.output or Path("data/choices") / Path(args.config).stem)
        # torch and diffusers take seconds, and pairs that exist need neither.
        from experiments.labelling.drawing import drawn_pairs

        return drawn_pairs(args.config, prompts, args.pairs_per_prompt, args.seed, folder, rest), folder
    place = _absolute(args.pairs)
    folder = _absolute(args.output or (place if place.is_dir() else place.parent))
    files = sorted(place.glob("*.parquet")) if place.is_dir() else [place] * (place.suffix == ".parquet")
    if not files:
        return ListedPairs(read_pairs(place, folder)), folder
    from experiments.labelling.unpacking import ParquetPairs

    if not all(path.is_file() for path in files):
        raise DataError(f"{place} does not exist")
    return ParquetPairs(files, folder), folder


def _absolute(path: Path) -> Path:
    return path.expanduser().resolve()


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listener(host: str, port: int) -> socket.socket:
    """An open socket, before anything is loaded.

    Raises:
        ConfigError: the port is taken, or the address is not this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror or error).partition(" (")[0]
        remedy = "give another --port (0 takes a free one) or --host"
        raise ConfigError(f"cannot listen on {host}, port {port}: {reason}; {remedy}") from error


def _serve(session: Session, listener: socket.socket, host: str, token: str | None) -> None:
    import uvicorn

    from experiments.labelling.server import application

    server = uvicorn.Server(
        uvicorn.Config(application(session, token), log_level="warning", access_log=False, server_header=False,
                       timeout_graceful_shutdown=1)
    )  # fmt: skip
    here = f"[{host}]" if ":" in host else host
    address = f"http://{here}:{listener.getsockname()[1]}/" + (f"?token={token}" if token else "")
    sys.stdout.write(f"choose at {address} ; choices go to {session.log.path} ; Ctrl+C ends\n")
    sys.stdout.flush()
    server.run(sockets=[listener])


if __name__ == "__main__":
    run_command(main)
