"""The page in a real browser without a network: what it says equals what numpy says."""

import shutil

import numpy as np
import pytest

pytestmark = pytest.mark.browser

NAMES = "rows => rows.map(row => row.dataset.name)"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def opened(browser, written):
    """The page, opened once; fails at the end if it asked for anything, or anything was said on the console."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, offline=True)
    page, asked, said = context.new_page(), [], []
    address = written[0].as_uri()
    context.route("**/*", lambda route: route.continue_() if route.request.url == address else route.abort())
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    yield page
    context.close()
    assert set(asked) == {address}
    # Chromium advises tests, which read canvases back, on how to do so faster.
    assert [text for text in said if "willReadFrequently" not in text] == []


@pytest.fixture
def page(opened):
    """The open page with the choices it starts with."""
    opened.set_viewport_size({"width": 1200, "height": 900})
    opened.select_option("#cone-pattern", "near")
    opened.select_option("#cone-head", "0")
    opened.check("#cone-strength")
    return opened


def click_cell(page, results, t, h, w):
    """Clicks a cell; returns the number of its token."""
    grid = results["grid"]
    target = page.locator(f'canvas[data-frame="{t}"]')
    target.scroll_into_view_if_needed()
    box = target.bounding_box()
    spot = {"x": (w + 0.5) * box["width"] / grid["w"], "y": (h + 0.5) * box["height"] / grid["h"]}
    target.click(position=spot)
    token = (t * grid["h"] + h) * grid["w"] + w
    page.wait_for_selector(f'#cone-query[data-token="{token}"]')
    return token


def weights(results, name, head, token):
    """Seen tokens, and softmax(scale * q . k) over them."""
    cone = results["pictures"]["cones"][name]
    seen = np.flatnonzero(cone["mask"][head if len(cone["mask"]) > 1 else 0, token])
    q, k = (cone[part][head].astype(np.float64) for part in ("q", "k"))
    powers = np.exp(results["pictures"]["scale"] * (k[seen] @ q[token]))
    return seen, powers / powers.sum()


def expect_cone(page, results, name, head, token):
    seen, share = weights(results, name, head, token)
    assert page.locator("#cone-count").get_attribute("data-count") == str(len(seen))
    assert f"{len(seen)} of 315 tokens" in page.locator("#cone-count").inner_text()
    strongest = page.locator("#cone-strongest")
    assert strongest.get_attribute("data-token") == str(seen[share.argmax()])
    assert float(strongest.get_attribute("data-weight")) == pytest.approx(share.max(), rel=1e-9)


def cell_colours(page, results):
    """Colour of the middle of every cell, int [N, 3], in token order."""
    read = """(grid) => Array.from({length: grid.t}, (_, t) => {
        const made = document.querySelector(`canvas[data-frame="${t}"]`), cell = made.width / grid.w;
        const pixels = made.getContext("2d").getImageData(0, 0, made.width, made.height).data;
        return Array.from({length: grid.h * grid.w}, (_, i) => {
            const x = Math.floor((i % grid.w + 0.5) * cell), y = Math.floor((Math.floor(i / grid.w) + 0.5) * cell);
            return Array.from(pixels.slice(4 * (y * made.width + x), 4 * (y * made.width + x) + 3));
        });
    })"""
    return np.array(page.evaluate(read, results["grid"])).reshape(-1, 3)


def test_the_best_pattern_is_shown_first(page):
    page.select_option("#cone-pattern", "dense")
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.input_value("#cone-pattern") == page.input_value("#picture-pattern") == "near"
    assert page.eval_on_selector_all("#rows tbody tr", NAMES)[0] == "dense"


def test_a_click_counts_the_tokens_seen_and_finds_the_strongest(page, written):
    results = written[1]
    for cell in [(3, 2, 4), (0, 0, 0), (4, 6, 8)]:
        expect_cone(page, results, "near", 0, click_cell(page, results, *cell))


@pytest.mark.parametrize("name", ["dense", "divided", "heads"])
def test_pattern_and_head_change_the_cone(page, written, name):
    results = written[1]
    token = click_cell(page, results, 3, 1, 5)
    page.select_option("#cone-pattern", name)
    for head in (1, 0):
        page.select_option("#cone-head", str(head))
        page.wait_for_selector(f'#cone-count[data-count="{len(weights(results, name, head, token)[0])}"]')
        expect_cone(page, results, name, head, token)


def test_colours_are_dark_where_unseen_and_lightest_at_the_strongest(page, written):
    results = written[1]
    token = click_cell(page, results, 2, 3, 4)
    seen, share = weights(results, "near", 0, token)
    unseen = np.setdiff1d(np.arange(315), seen)
    strong = cell_colours(page, results)
    assert (strong[unseen] == [29, 39, 48]).all()
    light = strong[seen].sum(1)
    assert light.min() > 29 + 39 + 48
    assert light.argmax() == share.argmax()
    assert (np.diff(light[share.argsort()]) >= -1).all()
    page.uncheck("#cone-strength")
    who = cell_colours(page, results)
    assert (who[unseen] == [29, 39, 48]).all()
    assert (who[seen] == [25, 168, 157]).all()


def test_a_query_may_see_nothing(page, written):
    click_cell(page, written[1], 0, 3, 3)
    page.select_option("#cone-head", "1")
    page.select_option("#cone-pattern", "heads")
    page.wait_for_selector('#cone-count[data-count="0"]')
    assert page.locator("#cone-strongest").inner_text() == "strongest none"


def test_keys_move_the_query(page, written):
    token = click_cell(page, written[1], 1, 0, 8)
    page.focus("#cone-frames")
    for key, change in [("ArrowUp", 0), ("ArrowDown", 9), ("ArrowRight", 0), ("ArrowLeft", -1), (".", 63), (",", -63)]:
        page.keyboard.press(key)
        token += change
        page.wait_for_selector(f'#cone-query[data-token="{token}"]')


def test_heads_of_the_table_sort_it(page, written):
    results = written[1]
    by_time = [row["name"] for row in sorted(results["rows"], key=lambda row: row["forward_ms"])]
    head = page.locator('th[data-key="forward_ms"]')
    for order, direction in [(by_time, "ascending"), (by_time[::-1], "descending")]:
        head.get_by_role("button").click()
        assert page.eval_on_selector_all("#rows tbody tr", NAMES) == order
        assert head.get_attribute("aria-sort") == direction
    page.locator('th[data-key="name"] button').press("Enter")
    assert page.eval_on_selector_all("#rows tbody tr", NAMES)[0] == "a <b>&'odd'"
    assert page.locator("tr.best").get_attribute("data-name") == "near"


def test_true_and_predicted_frames(page, written):
    pictures = written[1]["pictures"]
    read = """kind => Array.from(document.querySelectorAll(`canvas[data-kind="${kind}"]`), made =>
        Array.from(made.getContext("2d").getImageData(0, 0, made.width, made.height).data.filter((_, i) => i % 4 == 0)))
    """
    for name, clip in [("near", 0), ("dense", 2)]:
        page.select_option("#picture-pattern", name)
        page.select_option("#picture-clip", str(clip))
        true = pictures["true"][clip, ..., 0].reshape(5, -1)
        shown = pictures["predicted"][name][clip, ..., 0].reshape(5, -1)
        assert np.array_equal(page.evaluate(read, "true"), true)
        assert np.array_equal(page.evaluate(read, "predicted"), shown)
        assert np.array_equal(page.evaluate(read, "difference"), abs(true.astype(int) - shown))


def test_plot_is_drawn(page, written):
    assert page.locator("#speed-error .scatterlayer .trace").count() == 2
    drawn = page.locator("#speed-error .scatterlayer .textpoint").all_inner_texts()
    assert len(drawn) == len(written[1]["rows"])


@pytest.mark.parametrize("width", [1200, 800, 390])
def test_nothing_scrolls_sideways(page, tmp_path, width):
    page.set_viewport_size({"width": width, "height": 900})
    # plotly follows the window a moment later.
    page.evaluate("""async () => {
        const plot = document.querySelector("#speed-error .main-svg"), end = performance.now() + 5000;
        while (plot.clientWidth > innerWidth && performance.now() < end) await new Promise(requestAnimationFrame);
    }""")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shot = tmp_path / f"{width}.png"
    page.screenshot(path=shot, full_page=True)
    assert shot.stat().st_size > 20_000
