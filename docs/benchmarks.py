"""Writes the tables of docs/benchmarks.md and its pictures from CSV files: `python docs/benchmarks.py [RESULTS]`.

RESULTS: the folder of the files that `chronotope bench` wrote, benchmarks/results by default.
"""

import math
import sys
from collections.abc import Callable, Iterable
from html import escape
from itertools import groupby
from pathlib import Path

from chronotope.bench.cases import BACKWARD, BOTH, FORWARD
from chronotope.bench.results import Row, read_all, suffix
from chronotope.bench.routes import CHOOSING, growth
from chronotope.bench.why import loses, why

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: made by docs/benchmarks.py -->", "<!-- end of results -->"
PASSES = (FORWARD, BACKWARD, BOTH)
TITLES = {
    "attention": "Patterns",
    "windows": "Windows: sizes, heads, clips",
    "sequences": "Plain sequences",
    "temporal": "Along time",
    "planning": "Planning",
    "memory": "Memory",
    "rounding": "Rounding",
    "recurrences": "Recurrences",
    "stepping": "Stepping",
    "rollouts": "Rollouts",
    "routes": "Routes",
}
COLOURS = {
    "native": "#2f6f8f",
    "triton": "#2f6f8f",
    "torch": "#e08a2e",
    "flex": "#7a57a8",
    "FlexAttention": "#3f9b5a",
    "sdpa is_causal": "#8a8f98",
    "natten": "#c0476b",
    "fla": "#6b5b2e",
}
LEFT, WIDTH, STEP, TOP = 190, 560, 24, 62
Lines = list[str]


def page(rows: list[Row]) -> str:
    """What stands between the marks: a section for each machine, torch and number of threads."""
    if not rows:
        return "No files in `benchmarks/results`: `make bench` writes them.\n"
    out: Lines = []
    for name, own in by(rows, suffix).items():
        first = own[0]
        out += [f"## {first.machine}, {first.threads} threads, torch {first.torch}, Python {first.python}", ""]
        out += [f"Measured on {', '.join(sorted({row.date for row in own}))}.", ""]
        tables = by(own, lambda row: row.table)
        for table in (table for table in TITLES if table in tables):
            out += [f"### {TITLES[table]}", ""]
            if table in PICTURED:
                out += [
                    f"![{TITLES[table]}: times faster than dense, and the bound](benchmarks/{table}-{name}.svg)",
                    "",
                ]
            out += [*TABLES[table](tables[table]), ""]
    return "\n".join(out)


def by(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    """The rows of each key, in order of appearance."""
    out: dict[str, list[Row]] = {}
    for row in rows:
        out.setdefault(key(row), []).append(row)
    return out


def entries(rows: list[Row]) -> list[list[Row]]:
    """The passes of one kernel in one case."""
    return [list(some) for _, some in groupby(rows, lambda r: (r.row, r.grid, r.head_size, r.backend, r.dtype))]


def markdown(head: list[str], body: Iterable[list[str]]) -> Lines:
    """A table; all columns but the first two are numbers unless named otherwise."""
    words = {"row", "kernel", "why", "dtype", "pattern"}
    rule = ["---" if name in words else "---:" for name in head]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *body)]


def number(value: float | None, form: str = "{:.2f}") -> str:
    """A number, or a dash."""
    return "–" if value is None else form.format(value)


def seconds(value: float | None) -> str:
    """A time, in s from one second on."""
    if value is None:
        return "–"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.0f} ms" if value >= 0.1 else f"{1e3 * value:.1f} ms"


def speed(row: Row | None) -> str:
    """Times faster than dense, and the share of the bound."""
    if row is None or row.ratio_to_dense is None:
        return "–"
    return f"{row.ratio_to_dense:.1f}x ({number(row.reached)})"


def shape(row: Row) -> str:
    """Grid, heads and dtype."""
    tokens = row.grid.removeprefix("Grid(").removesuffix(")")
    heads = f"{row.heads} head{'' if row.heads == 1 else 's'} of {row.head_size}"
    return f"{tokens}; {heads}, {row.dtype}"


class Reasons:
    """Why rows lose: numbers for the table, and the list below it."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def of(self, some: list[Row]) -> str:
        """The number of the reason; nothing for a row that does not lose."""
        if not loses(some):
            return ""
        reason = why(some)
        if reason not in self.known:
            self.known.append(reason)
        return str(1 + self.known.index(reason))

    def lines(self) -> Lines:
        """The list."""
        return ["", "Why:", "", *(f"{i}. {reason}" for i, reason in enumerate(self.known, 1))] if self.known else []


def error(some: list[Row]) -> str:
    """The largest error of the passes."""
    return number(max((row.error for row in some if row.error is not None), default=None), "{:.1e}")


def times(rows: list[Row]) -> Lines:
    """Attention against dense: each pass as a ratio, and the share of the bound in brackets."""
    reasons, body, once = Reasons(), [], []
    for some in entries(rows):
        first, passes = some[0], {row.phase: row for row in some}
        took = {p: seconds(passes[p].seconds_median) for p in PASSES if p in passes}
        if first.row == first.backend:
            cells = [f"*{shape(first)}*", first.backend, "1", "1", "1x", *(took.get(p, "–") for p in PASSES)]
            body.append([*cells, *("" for _ in range(4))])
            continue
        cells = [first.row, first.backend, number(first.density, "{:.4f}"), number(first.tile_density, "{:.4f}")]
        cells.append(number(first.bound, "{:.1f}x"))
        if any(row.wrong for row in some):
            cells += ["WRONG"] * 3 + ["–"] * 2
        else:
            cells += [*(speed(passes.get(p)) for p in PASSES), took[FORWARD], took.get(BOTH, "–")]
        body.append([*cells, error(some), reasons.of(some)])
        extra = [f"{p} {seconds(row.seconds_median)}" for p, row in passes.items() if p not in PASSES]
        once += [f"{first.row}, {first.backend}: {', '.join(extra)}"] if extra else []
    head = ["row", "kernel", "density", "in tiles", "bound", *PASSES, "forward takes", "both take", "error", "why"]
    out = markdown(head, body) + reasons.lines()
    return out + (["", f"Once for a shape, not in the times above: {'; '.join(once)}."] if once else [])


def temporal(rows: list[Row]) -> Lines:
    """Along time: ratios to a user's rearranging, and GB/s beside the speed of copying."""
    head = ["row", "kernel", *(f"{p} {what}" for p in PASSES for what in ("takes", "ratio", "GB/s")), "error", "why"]
    reasons, body = Reasons(), []
    for some in entries(rows):
        first, passes = some[0], {row.phase: row for row in some}
        if first.backend == "copy":
            cells = [shape(first), first.backend, seconds(first.seconds_median), "", number(first.gb_per_s, "{:.1f}")]
            body.append(cells + [""] * (len(head) - len(cells)))
            continue
        cells = [shape(first), first.backend]
        for p in PASSES:
            row = passes.get(p, Row("", "", "", ""))
            took = "WRONG" if row.wrong else seconds(row.seconds_median)
            cells += [took, number(row.ratio_to_dense, "{:.1f}x"), number(row.gb_per_s, "{:.1f}")]
        body.append([*cells, error(some), reasons.of(some)])
    return markdown(head, body) + reasons.lines()


def planning(rows: list[Row]) -> Lines:
    """Seconds of planning with nothing kept."""
    body = [
        [
            row.row,
            row.backend,
            seconds(row.seconds_median),
            number(row.ratio_to_dense, "{:.1f}x"),
            number(row.peak_mb, "{:.0f} MB"),
        ]
        for row in rows
    ]
    return markdown(["row", "kernel", "takes", "faster than create_block_mask", "peak memory"], body)


def memory(rows: list[Row]) -> Lines:
    """Peak memory, as a multiple of q + k + v + out."""
    body = []
    for some in entries(rows):
        passes = {row.phase: row for row in some}
        cells = [
            f"{passes[p].peak_mb:.0f} MB ({passes[p].peak_share:.2f})" if p in passes else "–" for p in (FORWARD, BOTH)
        ]
        body.append([some[0].row, some[0].backend, *cells])
    return markdown(["row", "kernel", "forward", "forward+backward"], body)


def rounding(rows: list[Row]) -> Lines:
    """Errors against float64, and their ratio to torch's."""
    names = list(dict.fromkeys(row.phase for row in rows))
    body = []
    for some in entries(rows):
        found = {row.phase: row for row in some}
        cells = [f"{found[name].error:.1e} ({found[name].ratio_to_dense:.2f})" for name in names]
        body.append([some[0].dtype, some[0].backend, *cells])
    return markdown(["dtype", "kernel", *names], body)


def recurrences(rows: list[Row]) -> Lines:
    """Recurrences by form and backend over lengths: microseconds for each token, and what they are measured by."""
    head = [
        "row",
        "kernel",
        "tokens",
        "us/token",
        "both, us/token",
        "x of torch",
        "x of causal SDPA",
        "of peak",
        "error",
    ]
    body, torch = [], dict[tuple[str, str], float]()
    for some in sorted(entries(rows), key=lambda some: (some[0].row, some[0].backend != "torch")):
        first, both = some[0], next((row for row in some if row.phase == BOTH), None)
        if first.backend in ("matrix product", "causal SDPA"):
            continue
        tokens, took = int(first.grid[7:-1]), first.seconds_median
        if took is None:
            body.append([first.row, first.backend, f"{tokens:,}", "WRONG", *[""] * 4, error(some)])
            continue
        if first.backend == "torch":
            torch[first.row, first.grid] = took
        plain = torch.get((first.row, first.grid))
        per = [number(None if row is None else 1e6 * (row.seconds_median or 0) / tokens) for row in (first, both)]
        ratios = [number(plain and plain / took, "{:.1f}x"), number(first.ratio_to_dense, "{:.1f}x")]
        body.append([first.row, first.backend, f"{tokens:,}", *per, *ratios, number(first.reached), error(some)])
    return markdown(head, body)


def stepping(rows: list[Row]) -> Lines:
    """What a token costs after contexts of each length, and what is carried."""
    contexts = list(dict.fromkeys(row.grid for row in rows))
    body = [
        [name, *(f"{1e6 * (row.seconds_median or 0):.0f} us, {row.peak_mb:.2f} MB" for row in some)]
        for name, some in by(rows, lambda row: row.row).items()
    ]
    return markdown(["row", *(f"{int(grid[7:-1]):,} tokens" for grid in contexts)], body)


def rollouts(rows: list[Row]) -> Lines:
    """What a frame costs after so many, and what is carried."""
    grids = list(dict.fromkeys(row.grid for row in rows))
    body = [
        [name, *(f"{1e3 * (row.seconds_median or 0):.2f} ms, {row.peak_mb:.2f} MB" for row in some)]
        for name, some in by(rows, lambda row: row.row).items()
    ]
    return markdown(["row", *(f"after {grid}" for grid in grids)], body)


def routes(rows: list[Row]) -> Lines:
    """Routes from end to end at each length, and how time grew between the shortest and the longest."""
    head = ["row", "tokens", "ms", "x of SDPA", "bound", "reached", "choosing, ms", "backward, x of SDPA's", "growth"]
    body = []
    for name, own in by(rows, lambda row: row.row).items():
        whole = [row for row in own if row.phase == FORWARD and row.seconds_median]
        for some in by(own, lambda row: row.grid).values():
            found = {row.phase: row for row in some}
            first, choosing, backward = found[FORWARD], found.get(CHOOSING), found.get(BACKWARD)
            cells = [
                number(first.seconds_median and 1e3 * first.seconds_median, "{:.1f}"),
                number(first.ratio_to_dense, "{:.1f}x"),
                number(first.bound, "{:.1f}x"),
                number(first.reached),
                number(choosing and choosing.seconds_median and 1e3 * choosing.seconds_median, "{:.1f}"),
                number(backward and backward.ratio_to_dense, "{:.1f}x"),
                f"N^{slope(whole):.2f}" if first is whole[-1] and len(whole) > 1 else "",
            ]
            body.append([name, f"{tokens(first):,}", *cells])
    return markdown(head, body)


def slope(rows: list[Row]) -> float:
    """Of log time over log length."""
    return growth([tokens(row) for row in rows], [row.seconds_median or math.nan for row in rows])


def tokens(row: Row) -> int:
    """Of a plain sequence."""
    return int(row.grid.removeprefix("Grid(n=").removesuffix(")"))


TABLES: dict[str, Callable[[list[Row]], Lines]] = {
    "attention": times,
    "windows": times,
    "sequences": times,
    "temporal": temporal,
    "planning": planning,
    "memory": memory,
    "rounding": rounding,
    "recurrences": recurrences,
    "stepping": stepping,
    "rollouts": rollouts,
    "routes": routes,
}
PICTURED = ("attention", "windows", "sequences")


def picture(rows: list[Row]) -> str:
    """Ratio to dense of each kernel in each row, on a log scale; a bar reaches to the bound."""
    timed = [row for row in rows if row.ratio_to_dense and row.backend != "dense" and row.phase in (FORWARD, BOTH)]
    names = by(timed, lambda row: row.row)
    low = min(0.9, *(row.ratio_to_dense or 1 for row in timed)) / 1.3
    high = max(max(row.ratio_to_dense or 1, row.bound or 1) for row in timed) * 1.3

    def x(value: float) -> float:
        return LEFT + WIDTH * math.log(value / low) / math.log(high / low)

    height = TOP + STEP * len(names) + 34
    parts = [f'<rect width="{LEFT + WIDTH + 40}" height="{height}" fill="white"/>', *legend(timed)]
    for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1):
        parts += axis(x(10.0**power), 10.0**power, height)
    for i, (name, some) in enumerate(names.items()):
        y = TOP + STEP * i + STEP / 2
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        bound = max(row.bound or 1 for row in some)
        left, right = sorted((x(1), x(bound)))
        parts.append(
            f'<rect x="{left:.1f}" y="{y - 8:.1f}" width="{max(right - left, 1):.1f}" height="16" fill="#e6ebf0"/>'
        )
        parts += [dot(x(row.ratio_to_dense or 1), y + (-3 if row.phase == FORWARD else 3), row) for row in some]
    head = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 40} {height}" font-size="12"'
    return f'<svg {head} font-family="sans-serif" fill="#222">\n' + "\n".join(parts) + "\n</svg>\n"


def axis(x: float, value: float, height: float) -> Lines:
    """A line of the scale, darker where nothing is gained."""
    colour = "#666" if value == 1 else "#d5dae0"
    return [
        f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{height - 30}" stroke="{colour}"/>',
        f'<text x="{x:.1f}" y="{height - 12}" text-anchor="middle">{value:g}x</text>',
    ]


def dot(x: float, y: float, row: Row) -> str:
    """Forward is filled, forward + backward hollow."""
    colour = COLOURS.get(row.backend, "#000")
    look = f'fill="{colour}"' if row.phase == FORWARD else f'fill="white" stroke="{colour}" stroke-width="1.8"'
    title = f"{row.row}, {row.backend}, {row.phase}: {row.ratio_to_dense:.2f}x"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {look}><title>{escape(title)}</title></circle>'


def legend(rows: list[Row]) -> Lines:
    """Which colour is which kernel."""
    parts, x = [], 12.0
    for name in dict.fromkeys(row.backend for row in rows):
        parts.append(f'<circle cx="{x}" cy="16" r="4" fill="{COLOURS.get(name, "#000")}"/>')
        parts.append(f'<text x="{x + 8}" y="20">{escape(name)}</text>')
        x += 30 + 6.6 * len(name)
    words = "times faster than dense; filled: forward, hollow: forward + backward; grey: from 1x to the bound"
    return [*parts, f'<text x="8" y="44" fill="#666">{words}</text>']


def pictures(rows: list[Row]) -> dict[str, str]:
    """File name and contents of each picture."""
    groups = by((row for row in rows if row.table in PICTURED), lambda row: f"{row.table}-{suffix(row)}.svg")
    return {name: picture(some) for name, some in groups.items()}


def main(results: Path = HERE.parent / "benchmarks" / "results", document: Path = HERE / "benchmarks.md") -> None:
    """Replaces what stands between the marks, and the pictures in the folder beside the document."""
    rows = read_all(sorted(results.glob("*.csv")))
    before, rest = document.read_text().split(BEGIN)
    after = rest.split(END)[1]
    document.write_text(f"{before}{BEGIN}\n{page(rows)}{END}{after}")
    folder = document.with_suffix("")
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    for name, svg in pictures(rows).items():
        (folder / name).write_text(svg)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
