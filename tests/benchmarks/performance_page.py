"""The table of docs/performance.md from the rows that ``--results`` gathered in docs/performance.json.

python tests/benchmarks/performance_page.py
"""

import json
from pathlib import Path

DOCS = Path(__file__).parent.parent.parent / "docs"
BEGIN, END = "<!-- rows: written by tests/benchmarks/performance_page.py -->\n", "<!-- rows end -->\n"


def table(rows: dict[str, dict]) -> str:
    """In Markdown: ratios first, then what was measured alone."""
    lines = ["| row | against | times as fast: min / median / max | seconds, theirs and ours | size, rounds, date |",
             "|---|---|---|---|---|"]  # fmt: skip
    for name, row in rows.items():
        if "ratio" not in row:
            continue
        low, middle, high = row["ratio"]
        memory = f"; memory {row['memory_ratio']:.2f} of theirs" if "memory_ratio" in row else ""
        seconds = f"{row['peer_seconds'][1]:.3g}, {row['own_seconds'][1]:.3g}"
        moves = f"; moves {row['moves']}" if "moves" in row else ""
        ratio = f"{low:.2f} / **{middle:.2f}** / {high:.2f}"
        lines.append(f"| {name}{memory}{moves} | {row['peer']} | {ratio} | {seconds} | {conditions(row)} |")
    alone = [(name, row) for name, row in rows.items() if "ratio" not in row]
    if alone:
        lines += ["", "| row | measured: min / median / max | size, rounds, date |", "|---|---|---|"]
    for name, row in alone:
        numbers = ", ".join(f"{key.replace('_', ' ')} {shown(row[key])}" for key in row if key not in CONTEXT)
        lines.append(f"| {name} | {numbers} | {conditions(row)} |")
    return "\n".join(lines) + "\n"


CONTEXT = ("size", "device", "rounds", "date", "torch")


def conditions(row: dict) -> str:
    return f"{row['size']}, {row['rounds']}, {row['date']}, {row['device']}"


def shown(value: object) -> str:
    if isinstance(value, list):
        return " / ".join(f"{part:.3g}" for part in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def page(text: str, rows: dict[str, dict]) -> str:
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table(rows) + END + rest.partition(END)[2]


def main() -> None:
    file = DOCS / "performance.md"
    file.write_text(page(file.read_text(), json.loads((DOCS / "performance.json").read_text())))


if __name__ == "__main__":
    main()
