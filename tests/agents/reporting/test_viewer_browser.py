"""The page of a run in a real browser: pointer, keyboard, slider, filters, themes, widths, and texts that would do harm.

Chromium comes from the system (`apt-get install chromium`), and Playwright drives it. Skipped where one is missing.
"""

from __future__ import annotations

import shutil

import pytest

from agents.reporting.record_file import HELD_OUT, ROLLOUT
from agents.reporting.viewer import REFRESH, write_page
from tests.support.runs import record, report

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; apt-get install chromium"),
]

WORDS = ["The", " phone", " is", " great", "."]
# Of iteration 4: the second row has the worst advantage, the third the highest KL, and its score and gold are apart.
ROWS = [
    record(4, ROLLOUT, 0, WORDS, score=0.5, gold=0.5, kl=0.1),
    record(4, ROLLOUT, 1, [*WORDS, " Cheap"], score=1.5, gold=1.5, kl=0.2),
    record(4, ROLLOUT, 2, [" best"] * 3, score=2.5, gold=-1.0, kl=6.0),
]
ROWS[1]["numbers"]["advantage"][2] = -7.25
RECORDS = [
    record(0, HELD_OUT, 0, WORDS),
    record(0, HELD_OUT, 1, ["No"]),
    record(1, ROLLOUT, 0, ["first"]),
    *ROWS,
    record(10, HELD_OUT, 0, [*WORDS, " Buy"], score=2.0),
    record(10, HELD_OUT, 1, ["Yes"], score=3.0),
]


@pytest.fixture(scope="module")
def browser():
    """Chromium, without a window."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens the page of some records; at the end of the test, nothing has gone wrong and nothing was fetched."""
    wrong, pages = [], []

    def open_page(records=RECORDS, address: str = "", width: int = 1280, theme: str = "light", **changes):
        path = write_page(tmp_path, report(records, **changes))
        page = browser.new_page(viewport=dict(width=width, height=800), color_scheme=theme)
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        own = path.as_uri()
        page.on("request", lambda request: None if request.url.startswith(own) else wrong.append(request.url))
        page.goto(own + address)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert wrong == []


def number(page, name: str) -> str:
    """A number in the panel of the token."""
    return page.locator(f'#detail td[data-number="{name}"]').inner_text()


def responses(page) -> list[str]:
    """What the responses say, without the prompt and the numbers, in order."""
    return page.evaluate(
        "[...document.querySelectorAll('.text')].map((text) => [...text.querySelectorAll('.own')]"
        ".map((token) => token.firstChild.textContent).join(''))"
    )


def choose_rollouts(page) -> None:
    """From held-out prompts to the rollouts of training."""
    page.get_by_label("rollouts of training").check()


def test_hover_shows_the_numbers(show):
    """Under the pointer: every number of the token as it is in the record, and where it is."""
    page = show()
    choose_rollouts(page)
    page.locator(".text").nth(1).locator(".own").nth(2).hover()
    assert number(page, "advantage") == "-7.25" and number(page, "value") == "1.2"
    numbers = ROWS[1]["numbers"]
    for name, values in numbers.items():
        assert float(number(page, name)) == values[2]
    assert "token 3 of 6" in page.locator("#detail").inner_text()
    assert page.locator(".own.active").inner_text().strip() == "is"


def test_the_keyboard_goes_everywhere(show):
    """Tab reaches the tokens, arrow keys go along a response and to the next, and focus shows numbers as hover does."""
    page = show()
    choose_rollouts(page)
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
        if page.evaluate("document.activeElement.classList.contains('own')"):
            break
    assert {"step", "color", "sort", "search", "numbers"} <= reached
    focused = "document.activeElement.firstChild.textContent"
    assert page.evaluate(focused) == "The" and number(page, "advantage") == "-2"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    for key, text, advantage in [
        ("ArrowRight", " phone", "-1"),
        ("End", ".", "2"),
        ("ArrowDown", ".", "2.1"),
        ("Home", "The", "-1.9"),
    ]:
        page.keyboard.press(key)
        assert page.evaluate(focused) == text and number(page, "advantage") == advantage
    label = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert label == "The, advantage A_t -1.9"
    assert page.locator('.own[tabindex="0"]').count() == 3  # one stop for each response


def test_the_slider_goes_through_the_iterations(show):
    """By keyboard, from the last kept iteration to the first; its name says which."""
    page = show()
    choose_rollouts(page)
    assert len(responses(page)) == 3 and page.locator("#step-name").inner_text() == "4 of 10"
    page.locator("#step").focus()
    page.keyboard.press("ArrowLeft")
    assert responses(page) == ["first"] and page.locator("#step-name").inner_text() == "1 of 10"
    assert page.locator("#step").get_attribute("aria-valuetext") == "iteration 1"


def test_before_and_after_stand_side_by_side(show):
    """Held-out prompts come in pairs, or those before or after training alone."""
    page = show()
    assert page.locator(".pair").count() == 2
    assert responses(page) == ["The phone is great.", "The phone is great. Buy", "No", "Yes"]
    page.get_by_label("after", exact=True).check()
    assert responses(page) == ["The phone is great. Buy", "Yes"]
    page.locator("#sort").select_option(label="highest score")
    assert responses(page) == ["Yes", "The phone is great. Buy"]


@pytest.mark.parametrize(
    ("choice", "first", "why"),
    [
        ("worst advantage", "The phone is great. Cheap", "lowest A_t -7.25"),
        ("highest KL", " best best best", "KL 6.00"),
        ("score and gold apart", " best best best", "score above gold"),
        ("longest", "The phone is great. Cheap", "tokens 6"),
    ],
)
def test_what_is_shown_first(show, choice, first, why):
    """Each choice brings the response that it names to the top, and says why."""
    page = show()
    choose_rollouts(page)
    page.locator("#sort").select_option(label=choice)
    assert responses(page)[0] == first
    assert why in page.locator(".card").first.inner_text()


def test_search_leaves_what_contains_it(show):
    """Whatever the case; the number of responses says so."""
    page = show()
    choose_rollouts(page)
    page.locator("#search").fill("cheap")
    assert (
        responses(page) == ["The phone is great. Cheap"] and "1 of 3 responses" in page.locator("#count").inner_text()
    )
    page.locator("#search").fill("nowhere")
    assert responses(page) == [] and "0 of 3 responses" in page.locator("#count").inner_text()


def test_it_reads_without_color(show):
    """Size is the thickness of the underline, and the sign its kind; numbers stand under tokens when asked for."""
    page = show()
    choose_rollouts(page)
    looks = page.evaluate(
        "[...document.querySelectorAll('.text')[1].querySelectorAll('.own')].map((token) => {"
        "const style = getComputedStyle(token); return [parseInt(style.borderBottomWidth), style.borderBottomStyle]; })"
    )
    assert looks[2] == [4, "dashed"] and looks[5][1] == "solid" and looks[0][0] < 4
    page.get_by_label("numbers under tokens").check()
    small = page.locator(".text").nth(1).locator("small")
    assert [small.nth(at).inner_text() for at in (0, 2, 5)] == ["-1.90", "-7.25", "+3.10"]
    page.locator("#color").select_option(label="entropy")
    assert small.nth(5).inner_text() == "1.50" and "entropy" in page.locator("#legend").inner_text()


def test_colors_are_for_what_is_shown_or_for_the_whole_run(show):
    """Full color is at the largest number of the responses that are shown, or if asked for of all iterations."""
    page = show([record(1, ROLLOUT, 0, WORDS), record(2, ROLLOUT, 0, WORDS)])
    page.evaluate("records[0].numbers.advantage.fill(50)")
    page.locator("#color").select_option(label="entropy")
    page.locator("#color").select_option(label="advantage A_t")
    assert "+2.00" in page.locator("#legend").inner_text()
    page.get_by_label("the same colors at all iterations").check()
    assert "+50.00" in page.locator("#legend").inner_text()


def test_charts_answer_to_arrow_keys(show):
    """The numbers of an iteration stand under its chart, and an iteration that is lost leaves a gap in the line."""
    metrics = [dict(iteration=at, length=float(at)) for at in (1, 2, 3, 5, 6)]
    page = show(metrics=metrics)
    figure = page.locator("figure", has_text="Length")
    assert "iteration 6" in figure.inner_text() and "length 6.00" in figure.inner_text()
    line = figure.locator("path.dash-0").get_attribute("d")
    assert line.count("M") == 2 and line.count("L") == 3
    figure.locator("svg").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert "iteration 4" in figure.inner_text() and "length –" in figure.inner_text()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_themes_and_widths(show, theme, width):
    """The page takes the system's theme, and the button the other; it fits a phone without scrolling sideways."""
    page = show([record(1, ROLLOUT, 0, ["W" * 300, "\u0e01" * 200])], width=width, theme=theme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    color = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(color)
    assert (before == "rgb(246, 247, 249)") == (theme == "light")
    page.locator("#theme").click()
    assert page.evaluate(color) != before
    page.locator(".own").first.focus()
    inside = "(() => { const box = document.getElementById('detail').getBoundingClientRect(); return box.top < innerHeight; })()"
    assert page.evaluate(inside)  # the numbers are in sight


def test_a_view_survives_a_refresh(show):
    """What is chosen stands in the address; a page of a run that goes on comes back as it was, unless paused."""
    page = show(running=True, summary=None)
    choose_rollouts(page)
    page.locator("#color").select_option(label="entropy")
    page.locator(".text").nth(1).locator(".own").nth(2).hover()
    page.locator("#pause").click()
    assert page.locator("#pause").get_attribute("aria-pressed") == "true" and REFRESH >= 5
    address = page.evaluate("location.hash")
    again = show(running=True, summary=None, address=address)
    assert number(again, "entropy") == "1.2" and again.locator("#color").input_value() == "entropy"
    assert again.locator(".own.active").inner_text().strip() == "is"


def test_hostile_texts_do_no_harm(show):
    """Scripts are text, controls and marks of direction are visible, and each token keeps its own direction."""
    hostile = [
        "<script>document.title = 'gone'</script>",
        "</script><img src=x onerror=\"document.title='gone'\">",
        "\u202e\u2066\u200f\ufeff",
        "\x00\x1b\x7f\x9b\ttab\nline",
        "שלום",
        "👩\u200d👧",
        "\u0301\u0301",
        "\ud800",
        "\u2028",
    ]
    page = show([record(1, ROLLOUT, 0, hostile, prompt="<b>")], title="<i>run</i>")
    shown = page.evaluate("[...document.querySelectorAll('.own')].map((token) => token.firstChild.textContent)")
    assert shown[:2] == hostile[:2] and shown[4:6] == hostile[4:6]
    assert shown[2] == "\\u202e\\u2066\\u200f\\ufeff" and shown[3] == "␀␛␡\\u009b⇥tab↵\nline"
    assert shown[6] == "◌\u0301\u0301" and shown[7] == "\\ud800" and shown[8] == "\\u2028"
    assert page.title() == "<i>run</i>, seed 3" and page.locator("#tokens script, #tokens img, h1 i").count() == 0
    assert page.evaluate("getComputedStyle(document.querySelector('.own')).unicodeBidi") == "isolate"
    page.locator(".own").nth(1).hover()
    assert "<img" in page.locator("#detail h3").inner_text()


def test_the_policy_stops_what_would_run(browser, tmp_path):
    """Even a script that came into the page would not run: a second line of defense."""
    path = write_page(tmp_path, report(RECORDS))
    path.write_text(
        path.read_text(encoding="utf-8").replace("<main>", "<main><script>window.ran = 1</script>"), encoding="utf-8"
    )
    page = browser.new_page()
    page.goto(path.as_uri())
    assert page.evaluate("window.ran === undefined && document.documentElement.dataset.drawn !== undefined")
    page.close()


def test_long_responses_are_drawn(show):
    """4,000 tokens a response: drawn, colored and walked through."""
    words = [f" w{at % 50}" for at in range(4000)]
    page = show([record(1, ROLLOUT, row, words) for row in range(2)])
    assert page.locator(".own").count() == 8000
    page.locator(".own").first.focus()
    page.keyboard.press("End")
    assert number(page, "advantage") == "3997" and "token 4000 of 4000" in page.locator("#detail").inner_text()
