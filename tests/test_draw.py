"""The picture of one query's light cone."""

import struct
import zlib

import pytest
import torch

import chronotope as ct
from chronotope.draw import QUERY, SEEN, UNSEEN, draw

GRID = ct.Grid(t=3, h=4, w=5)


def test_cells_are_the_row_of_the_mask():
    where = ct.window(t=3, h=3, w=3) & ct.causal("t") | ct.sinks(2)
    for prefix in (0, 2):
        grid = ct.Grid(prefix=prefix, t=3, h=4, w=5)
        picture = draw(where, grid, (1, 0, 4))
        assert torch.equal(picture.seen[0], ct.plan(where, grid).mask()[picture.token])


def test_text_has_one_map_for_each_slice():
    assert str(draw(ct.along("h"), GRID, (1, 2, 3))).splitlines()[1:-1] == [
        "sees 4 of 60 tokens (6.67 %)",
        "t=0         t=1         t=2",
        "· · · · ·   · · · ██·   · · · · ·",
        "· · · · ·   · · · ██·   · · · · ·",
        "· · · · ·   · · · ◆ ·   · · · · ·",
        "· · · · ·   · · · ██·   · · · · ·",
    ]


def test_a_sequence_is_wrapped_and_the_middle_is_asked():
    lines = str(draw(ct.strided(n=5), ct.Grid(n=100))).splitlines()
    assert [len(line) for line in lines[2:-1]] == [64, 36]
    cells = "".join(lines[2:-1])
    assert [i for i, cell in enumerate(cells) if cell != UNSEEN] == list(range(0, 100, 5))
    assert cells[50] == QUERY and cells.count(SEEN) == 19


def test_two_axes_are_one_map_and_four_axes_name_both_slices():
    assert "t=" not in "".join(str(draw(ct.full(), ct.Grid(t=3, v=4))).splitlines()[1:])
    assert "b=1 t=0" in str(draw(ct.full(), ct.Grid(b=2, t=2, h=2, w=2)))


def test_a_query_that_does_not_see_itself_is_hollow():
    assert "◇" in str(draw(ct.causal("t", strict=True), GRID)).splitlines()[-3]
    assert "◇" not in "".join(str(draw(ct.full(), GRID)).splitlines()[:-1])


def test_heads_all_or_one():
    where = ct.per_head([ct.along("t"), ct.along("h", "w")])
    both = draw(where, GRID)
    assert both.heads == (0, 1) and both.seen.sum(1).tolist() == [3, 20]
    assert "head 1: along('h', 'w'): sees 20" in str(both)
    one = draw(where, GRID, head=1)
    assert one.heads == (1,) and torch.equal(one.seen[0], both.seen[1])


def test_prefix_has_a_line_of_its_own():
    lines = str(draw(ct.along("t") & ~ct.sinks(1), ct.Grid(t=2, h=2, w=2, prefix=3))).splitlines()
    assert lines[2] == "prefix ···"


def test_a_large_grid_is_drawn_from_one_row():
    picture = draw(ct.window(t=3, h=5, w=5), ct.Grid(t=64, h=128, w=128))
    assert int(picture.seen.sum()) == 75


def pixels(data):
    """Width, height and rows of pixels of a PNG as this library writes it, read from the format's definition."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, parts = 8, {}
    while place < len(data):
        (length,), kind = struct.unpack(">I", data[place : place + 4]), data[place + 4 : place + 8]
        body = data[place + 8 : place + 8 + length]
        assert struct.unpack(">I", data[place + 8 + length : place + 12 + length])[0] == zlib.crc32(kind + body)
        parts[kind] = body
        place += 12 + length
    width, height, depth, colour, *_ = struct.unpack(">IIBBBBB", parts[b"IHDR"])
    assert (depth, colour) == (8, 2)
    rows = torch.frombuffer(bytearray(zlib.decompress(parts[b"IDAT"])), dtype=torch.uint8).view(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def test_png_shows_the_cells(tmp_path):
    image = pixels(draw(ct.along("h"), GRID, (1, 2, 3)).save(tmp_path / "cone.png").read_bytes())
    size, gap = 12, 4
    cells = image[size // 2 :: size]
    # Slice t=1 begins after five cells and a gap; its column w=3 is seen.
    seen = [row[5 * size + gap + 3 * size + size // 2].tolist() for row in cells[:4]]
    assert seen == [[11, 110, 110], [11, 110, 110], [255, 157, 46], [11, 110, 110]]
    assert cells[0][size // 2].tolist() == [225, 230, 233]


def test_png_of_heads_prefix_and_a_wrapped_sequence(tmp_path):
    two = draw(ct.per_head([ct.along("t"), ct.full()]), GRID).save(tmp_path / "two.png")
    one = draw(ct.full(), GRID).save(tmp_path / "one.png")
    assert len(pixels(two.read_bytes())) > 1.9 * len(pixels(one.read_bytes()))
    assert pixels(draw(ct.full(), ct.Grid(n=70, prefix=2)).save(tmp_path / "n.png").read_bytes()).shape[1] > 64 * 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"query": (1, 2)}, r"query=\(1, 2\): expected one whole number for each of the axes t, h, w of Grid"),
        ({"query": {"t": 1, "h": 1, "x": 1}}, "expected one whole number for each of the axes t, h, w"),
        ({"query": (1, 2, 5)}, r"index\(w=5\) on Grid\(t=3, h=4, w=5\): expected 0 to 4"),
        ({"head": 1}, r"head=1: all heads of along\('t'\) are alike; leave head out"),
    ],
)
def test_bad_query_or_head(options, text):
    with pytest.raises(ct.ChronotopeError, match=text):
        draw(ct.along("t"), GRID, **options)


def test_bad_head_pattern_and_folder(tmp_path):
    with pytest.raises(ct.ChronotopeError, match=r"head=2: .* has the heads 0 to 1"):
        draw(ct.per_head([ct.full(), ct.along("t")]), GRID, head=2)
    with pytest.raises(ct.ChronotopeError, match="'x'"):
        draw(ct.along("x"), GRID)
    with pytest.raises(ct.ChronotopeError, match=r"is not a folder, expected one to write cone.png in: create it"):
        draw(ct.full(), GRID).save(tmp_path / "none" / "cone.png")
