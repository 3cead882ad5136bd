"""Writes the table of mechanisms into README.md, from the registry: `python docs/table.py`."""

from pathlib import Path

from chronotope.papers import papers

BEGIN, END = "<!-- papers: made by docs/table.py -->", "<!-- end of papers -->"


def table() -> str:
    """One row for each registered mechanism."""
    rows = ["| system | mechanism | what it does | status |", "|---|---|---|---|"]
    for paper in papers():
        status = paper.status if paper.missing is None else f"partial: {paper.missing}"
        module = paper.entry.__module__.replace(".", "/")
        rows.append(f"| {paper.system} | [{paper.name}](src/{module}.py) | {paper.claim} | {status} |")
    return "\n".join(rows)


def main() -> None:
    """Replaces what stands between the two marks."""
    readme = Path(__file__).parent.parent / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
