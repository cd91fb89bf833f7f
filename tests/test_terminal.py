"""Names and texts of files are shown on a terminal, never obeyed."""

import io

import pytest
from rich.console import Console

from datamodules.shards.bad_samples import BadSample
from experiments.cli.command import run_command
from experiments.comparison.page import ResultTable
from lightning_modules.errors import DataError
from lightning_modules.terminal import literal, printable

NASTY = "\x1b]0;taken\x07\x1b[2Ja\u202eb\x9b1m\n[red]c[/red]"


def test_control_characters_are_shown_as_escapes():
    shown = printable(NASTY)
    assert shown == r"\x1b]0;taken\x07\x1b[2Ja\u202eb\x9b1m\n[red]c[/red]"
    assert printable("naïve 猫 🐈") == "naïve 猫 🐈"


def test_rich_shows_a_name_and_does_not_obey_it():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200)
    console.print(literal(NASTY))
    console.print(ResultTable(f"title {NASTY}", ["method"], [[f"label {NASTY}"]]).for_terminal())
    assert "\x1b]" not in out.getvalue()
    assert "\x1b[2J" not in out.getvalue()
    assert out.getvalue().count("[red]c[/red]") == 3


def test_no_error_line_and_no_bad_sample_brings_control_characters(capsys):
    def command():
        raise DataError(f"no such file {NASTY}")

    with pytest.raises(SystemExit):
        run_command(command)
    line = capsys.readouterr().err
    assert line.startswith(r"error: no such file \x1b]0;taken\x07")
    assert set(line) & {"\x1b", "\x07", "\u202e", "\x9b"} == set()
    assert str(BadSample("a\x1b[2J.tar", "0", "why\x07")) == r"a\x1b[2J.tar, sample 0: why\x07"
