"""One page that holds an evaluation: tables, charts, pictures and the protocol; nothing is asked of anybody for it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from experiments.evaluation.findings import Method, baselines_of, methods, rewards
from experiments.evaluation.gallery import PICTURES, SIDE, Gallery, gallery
from experiments.evaluation.page_charts import histograms, styles, sweeps
from experiments.evaluation.records import as_csv
from experiments.evaluation.results import Evaluation
from experiments.evaluation.tables import CAPTION, markdown, tables
from lightning_modules.files import atomic_file

PAGE = "index.html"


def write_page(evaluation: Evaluation, folder: Path) -> Path:
    """Write ``evaluation.csv``, ``evaluation.md`` and ``index.html`` into the evaluation's folder; the page's path.

    The same bytes for the same evaluation and pictures.

    Raises:
        DataError: the folder does not take them.
    """
    contents = {
        "evaluation.csv": as_csv(evaluation),
        "evaluation.md": markdown(evaluation, title(evaluation)),
        PAGE: render(evaluation, folder),
    }
    for name, content in contents.items():
        with atomic_file(folder / name) as file:
            file.write(content.encode())
    return folder / PAGE


def render(evaluation: Evaluation, folder: Path) -> str:
    """The page, whole."""
    environment = Environment(loader=PackageLoader("experiments.evaluation", ""), autoescape=True)
    environment.trim_blocks = environment.lstrip_blocks = True
    style, script = (_source(environment, f"page.{kind}") for kind in ("css", "js"))
    everyone = methods(evaluation)
    return environment.get_template("page.html").render(
        title=title(evaluation),
        evaluation=evaluation,
        policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
        style=style,
        script=script,
        methods=_legend(everyone),
        styles=styles(everyone),
        tables=tables(evaluation),
        caption=CAPTION,
        sweeps=sweeps(evaluation),
        histograms=histograms(evaluation),
        galleries=_galleries(evaluation, folder),
        guidances=list(dict.fromkeys(method.guidance for method in everyone)),
        pictures=PICTURES,
        side=SIDE,
        protocol=list(flat(evaluation.protocol)),
    )


def title(evaluation: Evaluation) -> str:
    """Which policies, against what."""
    names = {True: [], False: []}  # type: dict[bool, list[str]]
    for method in methods(evaluation):
        if method.label not in names[method.baseline]:
            names[method.baseline].append(method.label)
    sides = [", ".join(names[baseline]) for baseline in (False, True) if names[baseline]]
    return " against ".join(sides)


def flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as names with dots and texts; an entry of a list goes by its "name", where it has one."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(inner, (dict, list)) for inner in value):
        for number, inner in enumerate(value):
            own = inner.get("name") if isinstance(inner, dict) else None
            yield from flat(inner, f"{name}.{own or number}")
    elif isinstance(value, list):
        yield name, ", ".join(map(_text, value))
    else:
        yield name, _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _source(environment: Environment, name: str) -> Markup:
    """A file of ours, to be taken as it is."""
    loader = environment.loader
    assert loader is not None
    return Markup(loader.get_source(environment, name)[0])


def _hash(text: str) -> str:
    """What a content policy allows a style or script by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _legend(everyone: Sequence[Method]) -> list[tuple[str, str, list[str]]]:
    """Label, class and sources of every method, once for all its guidances."""
    found: dict[str, list[str]] = {}
    for method in everyone:
        for run in method.runs:
            sources = found.setdefault(method.label, [])
            if run.source not in sources:
                sources.append(run.source)
    classes = styles(everyone)
    return [(label, classes[label], sources) for label, sources in found.items()]


def _galleries(evaluation: Evaluation, folder: Path) -> list[Gallery]:
    """Each policy by each reward at the first guidance, against its first baseline."""
    everyone = methods(evaluation)
    here = [method for method in everyone if method.guidance == everyone[0].guidance]
    beside = sorted(here, key=lambda method: not method.baseline)  # baselines at the left
    return [
        gallery(evaluation, folder, reward, policy, base, beside)
        for reward in rewards(evaluation)
        for policy in here
        for base in baselines_of(policy, everyone)[:1]
    ]
