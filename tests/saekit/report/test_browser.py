"""The site in a headless Chromium, opened from disk: no server, no network, no console errors."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import sync_playwright
from safetensors.numpy import load_file

from saekit.report import build_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
]
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


class Site:
    """One page of one report; remembers everything that went wrong."""

    def __init__(self, page: Any, folder: Path) -> None:
        self.page = page
        self.folder = folder
        self.complaints: list[str] = []
        page.on("console", lambda message: self.complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("requestfailed", lambda request: self.complaints.append(f"failed: {request.url}"))
        page.on("request", self._request)

    def _request(self, request: Any) -> None:
        if not request.url.startswith((f"file://{self.folder}", "data:")):
            self.complaints.append(f"request: {request.url}")

    def open(self, address: str = "") -> None:
        """Opens an address of the site anew."""
        self.page.goto("about:blank")
        self.page.goto(f"file://{self.folder}/index.html{address}")
        self.page.wait_for_selector("html[data-ready=yes]")

    def wait(self, expression: str) -> None:
        """Waits until a JavaScript expression is true."""
        # Not wait_for_function: it needs eval, which the page's content security policy forbids.
        deadline = time.monotonic() + 15
        while not self.page.evaluate(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            self.page.wait_for_timeout(20)

    def texts(self, selector: str) -> list[str]:
        """Returns the texts of all elements, in order."""
        return [text.strip() for text in self.page.locator(selector).all_inner_texts()]

    def count_line(self) -> str:
        """Returns what the table says of how many features it shows."""
        return str(self.page.inner_text(".count"))

    def rows(self) -> list[int]:
        """Returns the features in view, from the top."""
        return [int(text) for text in self.texts(".rows .row .c-id")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def open_site(browser: Any) -> Iterator[Callable[..., Site]]:
    """A function: folder, options of a browser context -> a site; at the end nothing may have gone wrong."""
    sites: list[Site] = []

    def make(folder: Path, **options: Any) -> Site:
        context = browser.new_context(viewport={"width": 1400, "height": 900}, **options)
        context.set_default_timeout(60_000)
        sites.append(Site(context.new_page(), folder))
        return sites[-1]

    yield make
    complaints = [complaint for site in sites for complaint in site.complaints]
    for site in sites:
        site.page.context.close()
    assert complaints == []


@pytest.fixture
def site(open_site: Callable[..., Site], report: Any) -> Site:
    """The report of three runs."""
    return open_site(report.folder)


def _labels(report: Any) -> dict[int, str]:
    lines = (report.runs[0].labels / "labels.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return {line["feature"]: line["label"] for line in found if line["labeler"] == "llm:judge-1" and "label" in line}


def _f1(report: Any) -> dict[int, float]:
    lines = (report.runs[0].labels / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return {line["feature"]: line["f1"] for line in found if line["labeler"] == "llm:judge-1"}


def test_the_overview_opens_from_disk(site: Site) -> None:
    site.open()
    assert site.page.evaluate("location.hash") == "#/topk"
    assert site.page.inner_text("#overview h1") == "topk"
    assert "0.310" in site.texts(".tile-value")
    assert site.page.locator("#overview svg[role=img]").count() == 10
    table = site.page.inner_text("table.figures >> nth=1")
    assert "PCA, 8 components" in table
    assert "0.3100" in table
    assert "0.3007 \u2026 0.3193" in table
    assert "A <b>report</b>" in site.page.title()


def test_saes_of_one_hook_point_are_drawn_against_each_other(site: Site) -> None:
    site.open()
    titles = site.texts("#overview .chart-title")
    assert titles.count("FVU against L0") == titles.count("CE recovered against L0") == 1


def test_charts_answer_the_pointer(site: Site) -> None:
    site.open("#/topk")
    site.page.locator("figure.chart svg").nth(3).hover()
    assert "training" in site.page.inner_text("#tooltip")
    site.page.mouse.move(5, 5)
    site.wait("document.getElementById('tooltip').hidden")


def test_another_run_is_one_click_away_and_says_what_it_lacks(site: Site) -> None:
    site.open("#/topk")
    site.page.click("#run-switch >> text=bare")
    site.wait("document.querySelector('#overview h1')?.textContent === 'bare'")
    text = site.page.inner_text("#overview")
    for part in ("this SAE was not evaluated", "Firing densities: not computed", "Labels: not computed"):
        assert part in text
    site.page.click("#tab-features")
    site.page.click(".rows .row >> nth=3")
    site.page.wait_for_selector("#feature-title")
    text = site.page.inner_text("#detail")
    for part in (
        "this SAE was not labelled",
        "no contexts were collected",
        "this SAE was not evaluated",
        "Not computed.",
    ):
        assert part in text


def test_search_narrows_to_labels_and_tokens(site: Site, report: Any) -> None:
    site.open("#/topk/features")
    assert site.count_line() == "150 features"
    site.page.fill("#search", "lunar dates")
    expected = sorted(feature for feature, label in _labels(report).items() if "lunar dates" in label)
    site.wait(f"document.querySelector('.count')?.textContent?.startsWith('{len(expected)} of')")
    assert sorted(site.rows()) == expected
    assert "q=lunar+dates" in site.page.evaluate("location.hash")
    site.page.fill("#search", "zzzz")
    site.wait("document.querySelector('.scroller').innerText.includes('No feature matches')")
    site.page.click("text=Clear filters")
    site.wait("document.querySelector('.count')?.textContent === '150 features'")
    assert site.page.input_value("#search") == ""


def test_search_finds_tokens_only_where_asked(site: Site, report: Any, read_payload: Any, unpack: Any) -> None:
    index = read_payload(report.folder / "data" / "topk" / "index.js")
    words = [word.lower() for word in index["words"]]
    slots = np.concatenate([unpack(index[name]).reshape(150, -1) for name in ("peak", "promoted")], axis=1)
    expected = [n for n in range(150) if any("moon" in words[slot] for slot in slots[n] if slot != 0xFFFFFFFF)]
    assert 0 < len(expected) < 150
    site.open("#/topk/features?q=moon&in=tokens&sort=id")
    assert site.count_line() == f"{len(expected)} of 150 features"
    assert site.rows() == expected[: len(site.rows())]
    site.page.select_option("[data-key=in]", "labels")
    site.wait("document.querySelector('.count')?.textContent?.startsWith('0 of')")


def test_a_number_finds_its_feature(site: Site) -> None:
    site.open("#/topk/features?q=%23123")
    assert site.rows() == [123]


@pytest.mark.parametrize("column", ["f1", "density", "max", "id", "label"])
def test_headers_sort_both_ways(site: Site, report: Any, column: str) -> None:
    arrays = load_file(report.runs[0].labels / "contexts" / "contexts.safetensors")
    labels, f1 = _labels(report), _f1(report)
    values: dict[str, Any] = {
        "f1": lambda n: f1.get(n),
        "density": lambda n: int(arrays["firing_count"][n]),
        "max": lambda n: float(arrays["max_act"][n]),
        "id": lambda n: n,
        "label": lambda n: labels.get(n, "").lower().replace("<", " ").replace("-", " ") or None,
    }
    site.open("#/topk/features?sort=id" if column != "id" else "#/topk/features")
    for click in range(2):
        site.page.click(f"[data-column={column}] button")
        direction = site.page.get_attribute(f"[data-column={column}]", "aria-sort")
        assert direction == ("descending" if (column in {"f1", "density", "max"}) == (click == 0) else "ascending")
        shown = [values[column](feature) for feature in site.rows()]
        assert None not in shown
        if column != "label":
            assert shown == sorted(shown, reverse=direction == "descending")
            extreme = (max if direction == "descending" else min)(
                value for value in map(values[column], range(150)) if value is not None
            )
            assert shown[0] == extreme
        else:
            # Numbers inside of labels count as numbers.
            keys = [[int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)] for text in shown]
            assert keys == sorted(keys, reverse=direction == "descending")


def test_filters_by_firing_labeler_and_ranges(site: Site, report: Any) -> None:
    site.open("#/topk/features?fires=no")
    assert site.count_line() == "10 of 150 features"
    assert all("never fired" in text for text in site.texts(".rows .row .c-label"))
    site.page.select_option("[data-key=fires]", "yes")
    site.wait("document.querySelector('.count')?.textContent?.startsWith('140 of')")
    site.page.select_option("[data-key=labeler]", "none")
    site.wait("document.querySelector('.count')?.textContent?.startsWith('1 of')")
    assert site.rows() == [5]
    site.page.select_option("[data-key=labeler]", "lexical")
    site.wait("document.querySelector('.count')?.textContent?.startsWith('139 of')")
    assert all("(lexical" in text or "<script>" in text for text in site.texts(".rows .row .c-label"))
    site.page.click(".ranges summary")
    density = load_file(report.runs[0].labels / "contexts" / "contexts.safetensors")["firing_count"] / 200_000
    site.page.fill("[data-key=density_min]", "0.5")
    expected = sum(density[n] >= 0.005 for n in range(140) if n != 5)
    site.wait(f"document.querySelector('.count')?.textContent?.startsWith('{expected} of')")
    site.page.fill("[data-key=f1_max]", "0")
    site.wait("document.querySelector('.count')?.textContent?.startsWith('0 of')")


def test_only_rows_in_view_exist(site: Site) -> None:
    site.open("#/topk/features?sort=id")
    assert len(site.rows()) < 45
    site.page.evaluate("document.querySelector('.scroller').scrollTop = 1e9")
    site.wait("document.getElementById('row-149') !== null")
    assert 0 not in site.rows()
    assert site.page.get_attribute(".scroller", "aria-rowcount") == "151"


def test_a_feature_opens_from_its_row(site: Site, report: Any) -> None:
    site.open("#/topk/features?q=%237&sort=id")
    site.page.click("#row-7")
    site.page.wait_for_selector("#feature-title")
    assert site.page.evaluate("location.hash") == "#/topk/feature/7"
    assert site.page.inner_text("#feature-title") == _labels(report)[7]
    panel = site.page.inner_text("#detail")
    assert "llm:judge-1" in panel
    assert "lexical" in panel
    assert "base rate 0.0040" in panel
    arrays = load_file(report.runs[0].labels / "contexts" / "contexts.safetensors")
    acts = [float(text) for text in site.texts(".context-act b")]
    assert acts == pytest.approx(arrays["top_act"][7][:10].tolist(), rel=5e-3)
    site.page.click(".show-more")
    assert site.page.locator(".context").count() == 20
    assert site.page.locator(".t.peak").count() == 20


def test_tokens_show_their_values(site: Site, report: Any) -> None:
    arrays = load_file(report.runs[0].labels / "contexts" / "contexts.safetensors")
    site.open("#/topk/feature/8")
    site.page.hover(".context >> nth=0 >> .t.peak")
    tip = site.page.inner_text("#tooltip")
    assert f"{arrays['top_act'][8][0]:.3g}" in tip
    assert "100 % of the feature's largest" in tip
    window, peak = arrays["top_window"][8][0], arrays["top_position"][8][0]
    lit = [n for n in range(32) if window[n] > 0]
    spans = site.page.locator(".context >> nth=0 >> .t.on")
    assert spans.count() == len(lit)
    first = spans.nth(0)
    share = window[lit[0]] / 255 if lit[0] != 16 else 1.0
    assert float(first.evaluate("node => node.style.getPropertyValue('--a')")) == pytest.approx(
        0.14 + 0.86 * share, abs=2e-3
    )
    assert peak >= 0


def test_a_context_expands_to_its_whole_row_and_back(site: Site) -> None:
    site.open("#/topk/feature/8")
    context = site.page.locator(".context").nth(0)
    before = context.locator(".context-text").inner_text()
    context.locator(".expand").click()
    site.wait("document.querySelector('.context .t.beyond') !== null")
    assert context.locator(".t").count() == 48
    assert len(context.locator(".context-text").inner_text()) > len(before)
    context.locator(".expand").click()
    assert context.locator(".context-text").inner_text() == before


def test_all_strengths_are_grouped_by_activation(site: Site) -> None:
    site.open("#/topk/feature/8")
    site.page.keyboard.press("t")
    assert site.page.get_attribute("[data-kind=sampled]", "aria-pressed") == "true"
    acts = [float(text.replace(",", "")) for text in site.texts(".context-act b")]
    assert len(acts) == 20
    assert acts == sorted(acts, reverse=True)
    assert all(text.startswith("activation") for text in site.texts(".stratum h3"))


def test_keys_walk_through_the_current_list(site: Site) -> None:
    site.open("#/topk/features?sort=-id")
    top = site.rows()[:3]
    assert top == [149, 148, 147]
    site.page.click(f"#row-{top[1]}")
    site.wait("document.querySelector('.around')?.textContent === '2 of 150'")
    for key, feature in (("j", 147), ("ArrowLeft", 148), ("k", 149), ("k", 149), ("ArrowRight", 148)):
        site.page.keyboard.press(key)
        site.wait(
            f"location.hash === '#/topk/feature/{feature}' && document.querySelector('.crumb b')?.textContent === '{feature}'"
        )
    site.page.keyboard.press("Escape")
    site.wait("location.hash === '#/topk/features?sort=-id'")
    assert site.rows()[:3] == top


def test_a_random_feature_is_of_the_current_list(site: Site) -> None:
    site.open("#/topk/features?q=lunar+dates")
    shown = set(site.rows())
    site.page.click("text=Random")
    for _ in range(5):
        site.wait("document.querySelector('.crumb b') !== null")
        assert int(site.page.inner_text(".crumb b")) in shown
        site.page.keyboard.press("r")


def test_the_table_is_usable_by_keyboard_alone(site: Site) -> None:
    site.open("#/topk/features?sort=id")
    site.page.keyboard.press("/")
    site.wait("document.activeElement.id === 'search'")
    site.page.keyboard.type("financial")
    site.wait("document.querySelector('.count')?.textContent?.includes(' of ')")
    rows = site.rows()
    site.page.keyboard.press("ArrowDown")
    site.page.keyboard.press("ArrowDown")
    site.wait(f"document.querySelector('.scroller').getAttribute('aria-activedescendant') === 'row-{rows[1]}'")
    site.page.keyboard.press("Enter")
    site.wait(f"location.hash === '#/topk/feature/{rows[1]}'")
    site.page.keyboard.press("?")
    site.page.wait_for_selector("#help[open]")
    site.page.keyboard.press("Escape")
    site.wait("!document.getElementById('help').open")
    assert site.page.evaluate("location.hash") == f"#/topk/feature/{rows[1]}"


def test_nearest_features_are_links(site: Site, report: Any) -> None:
    arrays = load_file(report.runs[0].evaluation / "features.safetensors")
    site.open("#/topk/feature/3")
    links = site.page.locator(".neighbors a")
    assert links.evaluate_all("nodes => nodes.map(node => node.hash)") == [
        f"#/topk/feature/{n}" for n in arrays["neighbor_indices"][3]
    ]
    assert [float(text) for text in site.texts(".neighbors .effect-value")] == pytest.approx(
        arrays["neighbor_cosines"][3].tolist(), abs=6e-3
    )
    links.nth(0).click()
    site.wait("document.querySelector('.crumb b')?.textContent === '4'")


def test_dead_and_failed_features_say_so(site: Site) -> None:
    site.open("#/topk/feature/149")
    text = site.page.inner_text("#detail")
    assert site.page.inner_text("#feature-title") == "Never fired"
    assert "Never fired in 200,000 tokens" in text
    assert site.page.locator(".effect li").count() > 0
    site.open("#/topk/feature/5")
    assert "Failed: no answer in 3 tries" in site.page.inner_text("#detail")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("#/topk/feature/150", "There is no feature"),
        ("#/topk/feature/x", "There is no feature"),
        ("#/gone/features", "There is no SAE called"),
    ],
    ids=["beyond", "not-a-number", "no-such-run"],
)
def test_wrong_addresses_are_told(site: Site, address: str, expected: str) -> None:
    site.open(address)
    site.wait(f"document.querySelector('main').innerText.includes('{expected}')")


def test_texts_of_labels_and_tokens_never_become_markup(site: Site) -> None:
    for address in ("#/topk", "#/topk/features?q=hacked", "#/topk/feature/0"):
        site.open(address)
        assert site.page.evaluate("window.hacked") is None
        assert site.page.locator("main script, main img").count() == 0
    assert site.page.inner_text("#feature-title").startswith("<script>window.hacked = 3</script><img")
    site.open("#/topk/features?q=%3Cimg")
    assert site.rows() == [0]


def test_hostile_tokens_never_become_markup(
    open_site: Callable[..., Site], write_run: Any, store: Path, tokenizer: Any, tmp_path: Path
) -> None:
    class Hostile:
        all_special_ids = (0,)

        def __len__(self) -> int:
            return 400

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [
                f"\u0120</script><script>window.hacked={token}</script><img src=x onerror=window.hacked=1>"
                for token in ids
            ]

        def decode(self, token_ids: list[int]) -> str:
            return "unused"

    build_report(
        tmp_path / "r",
        title="</title><script>window.hacked=1</script>",
        store=store,
        runs=[write_run()],
        tokenizer=Hostile(),
    )
    site = open_site(tmp_path / "r")
    for address in ("#/topk/features", "#/topk/feature/1"):
        site.open(address)
        assert site.page.evaluate("window.hacked") is None
        assert site.page.locator("body script:not([src]), main img").count() == 0
    assert "</script><script>window.hacked=" in site.page.inner_text(".context-text >> nth=0")
    site.page.click(".expand >> nth=0")
    site.wait("document.querySelector('.context .t.beyond') !== null")
    site.page.hover(".t.peak >> nth=0")
    assert site.page.evaluate("window.hacked") is None


def test_a_missing_chunk_is_told_and_the_rest_goes_on(
    open_site: Callable[..., Site], report: Any, tmp_path: Path
) -> None:
    shutil.copytree(report.folder, tmp_path / "r")
    (tmp_path / "r" / "data" / "topk" / "chunk-0001.js").unlink()
    site = open_site(tmp_path / "r")
    site.open("#/topk/feature/70")
    site.wait("document.getElementById('failure')?.textContent?.includes('chunk-0001.js cannot be read')")
    site.page.evaluate("location.hash = '#/topk/feature/3'")
    site.wait("document.querySelector('.crumb b')?.textContent === '3'")
    assert site.page.locator("#failure").is_hidden()
    assert any("chunk-0001" in complaint for complaint in site.complaints)
    site.complaints.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system_and_the_button(open_site: Callable[..., Site], report: Any, scheme: str) -> None:
    site = open_site(report.folder, color_scheme=scheme)
    site.open("#/topk")
    luminance = "(() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0))()"
    assert (site.page.evaluate(luminance) > 384) == (scheme == "light")
    site.page.click("#theme-button")
    assert (site.page.evaluate(luminance) > 384) == (scheme == "dark")
    site.open("#/topk")
    assert (site.page.evaluate(luminance) > 384) == (scheme == "dark")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_on_highlights_is_readable(open_site: Callable[..., Site], report: Any, scheme: str) -> None:
    site = open_site(report.folder, color_scheme=scheme)
    site.open("#/topk/feature/8")
    ratios = site.page.evaluate(
        """() => {
          const paint = (color, under) => {
            const canvas = document.createElement("canvas");
            canvas.width = canvas.height = 1;
            const context = canvas.getContext("2d");
            for (const layer of [under, color]) if (layer) { context.fillStyle = layer; context.fillRect(0, 0, 1, 1); }
            return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
          };
          const luminance = (rgb) => rgb.map((c) => c / 255).map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
            .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
          return [...document.querySelectorAll(".t.on")].map((node) => {
            const surface = getComputedStyle(document.querySelector(".context-lists")).backgroundColor;
            const [back, text] = [paint(getComputedStyle(node).backgroundColor, surface), paint(getComputedStyle(node).color)];
            const [a, b] = [luminance(back), luminance(text)].sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05);
          });
        }"""
    )
    assert len(ratios) > 20
    assert min(ratios) > 4.5


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("address", ["#/topk", "#/topk/features", "#/topk/feature/8"])
def test_nothing_overflows_sideways(site: Site, width: int, address: str) -> None:
    site.page.set_viewport_size({"width": width, "height": 850})
    site.open(address)
    assert site.page.evaluate("document.documentElement.scrollWidth") <= width
    for selector in ("#overview", "#list", "#detail"):
        wide = site.page.evaluate(
            f"(() => {{ const n = document.querySelector('{selector}'); return n.scrollWidth - n.clientWidth; }})()"
        )
        assert wide <= 0, selector


def test_narrow_screens_show_either_table_or_feature(site: Site) -> None:
    site.page.set_viewport_size({"width": 400, "height": 850})
    site.open("#/topk/features")
    assert site.page.is_visible("#list")
    site.page.click(".rows .row >> nth=0")
    site.page.wait_for_selector("#feature-title")
    assert not site.page.is_visible("#list")
    site.page.click("#close-feature")
    site.wait("document.getElementById('detail').hidden")
    assert site.page.is_visible("#list")


@pytest.mark.slow
def test_thousands_of_features_are_drawn_a_screen_at_a_time(
    open_site: Callable[..., Site], write_run: Any, store: Path, tokenizer: Any, tmp_path: Path
) -> None:
    run = write_run("large", num_features=4_000, num_dead=160)
    build_report(tmp_path / "r", title="Large", store=store, runs=[run], tokenizer=tokenizer)
    site = open_site(tmp_path / "r")
    site.open("#/large/features")
    assert site.count_line() == "4,000 features"
    assert 10 < len(site.rows()) < 200
    site.page.click("[data-column=density] button")
    assert 10 < len(site.rows()) < 200
    site.page.fill("#search", "lunar dates")
    site.wait("document.querySelector('.count')?.textContent?.includes(' of 4,000')")
    assert 10 < len(site.rows()) < 200
    site.page.evaluate("location.hash = '#/large/feature/3600'")
    site.wait("document.querySelector('.crumb b')?.textContent === '3600'")


def test_judges_controls_failures_and_money_are_on_the_overview(site: Site, report: Any) -> None:
    site.open()
    shown = site.page.inner_text("#judged")
    assert "Detection by judge-1: means over features" in shown
    rows = {text.split("\t")[0]: text for text in site.texts("#judged [aria-label=Detection] tbody tr")}
    assert list(rows) == ["llm:judge-1", "empty label", "random words", "another feature's label"]
    assert f"{np.mean(list(_f1(report).values())):.2f}" in rows["llm:judge-1"]
    assert "0.25" in rows["another feature's label"]
    assert "1 failed: no answer in 3 tries; skipped: never fires" in shown
    assert "431 requests" in shown
    assert "$0.153" in shown


def test_judges_and_controls_are_on_the_feature_page(site: Site) -> None:
    site.open("#/topk/feature/0")
    cards = site.texts(".label-card .score")
    assert any("Detection" in card and "F1 at natural rate" in card and "judge judge-1" in card for card in cards)
    assert any("F1 of labels that know nothing: empty label 0.00 \u00b7 random words 0.13" in card for card in cards)


def test_a_scorer_that_the_page_does_not_know_is_shown(site: Site) -> None:
    site.open()
    text = site.page.evaluate(
        "saekit.judged.scoreTable({scorer: 'simulation', judge: 'j', pearson: 0.625, pearson_low: 0.5, pearson_high: 0.75, nats_gained: -1.5, num_near: 2,"
        " num_positive: 3, num_negative: 4, num_unparsed: 0}, [{labeler: 'control:empty', pearson: 0.0625}]).textContent"
    )
    assert "Simulation" in text
    assert "correlation0.63" in text
    assert "2 near ones are silent" in text
    assert "95 %: 0.50" in text
    assert "nats gained" in text
    assert "empty label 0.06" in text


@pytest.mark.parametrize("width", [380, 1400])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_judges_fit_on_narrow_and_wide_pages(
    open_site: Callable[..., Site], report: Any, width: int, theme: str
) -> None:
    site = open_site(report.folder, color_scheme=theme)
    site.page.set_viewport_size({"width": width, "height": 900})
    site.open()
    box = site.page.locator("#judged").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
