"""The page of `f2gguf serve` in a real browser: Debian's chromium, through chromedriver. Skipped where it is not."""

from __future__ import annotations

import gc
import json
import re
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import Release
from f2gguf.runtime import Embedder
from f2gguf.runtime.gguf.describe import drift_of
from f2gguf.runtime.gguf.header import read_header
from f2gguf.runtime.server.models import Limits
from serving import Served, serving_process, serving_thread

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

BINARIES = [shutil.which(name) for name in ("chromium", "chromedriver")]
pytestmark = pytest.mark.skipif(
    None in BINARIES, reason="no chromium and chromedriver here: apt-get install chromium chromium-driver"
)
ODD = 'it\'s "odd"'  # a model's name that shells, Python and JavaScript each quote differently
TEXTS = ["unpack a zip archive", "Programm zum Entpacken", "edit photos", "<img src=x onerror=alert(1)> & co"]
CONTRASTS = """
const paper = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const painted = colour => {
  paper.clearRect(0, 0, 1, 1);
  paper.fillStyle = colour;
  paper.fillRect(0, 0, 1, 1);
  return [...paper.getImageData(0, 0, 1, 1).data];
};
const luminance = colour => painted(colour).slice(0, 3).map(value => value / 255)
  .map(v => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = node => {
  for (; node; node = node.parentElement)
    if (painted(getComputedStyle(node).backgroundColor)[3] === 255) return getComputedStyle(node).backgroundColor;
  return "Canvas";
};
const contrast = node => {
  const [dark, light] = [getComputedStyle(node).color, behind(node)].map(luminance).sort((a, b) => a - b);
  return (light + 0.05) / (dark + 0.05);
};
"""  # WCAG 2's, of an element's text with the nearest opaque background


class Page:
    """The page in a browser, as a person uses it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(url)
        self.until(lambda: self.shows("main") or self.shows("key-form") or self.shows("again"))

    def script(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def find(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def text(self, name: str) -> str:
        return str(self.find(name).text)

    def shows(self, name: str) -> bool:
        return bool(self.find(name).is_displayed())

    def write(self, name: str, text: str) -> None:
        self.find(name).clear()
        self.find(name).send_keys(text)

    def choose(self, name: str, value: str) -> None:
        options = self.find(name).find_elements("tag name", "option")
        next(option for option in options if option.get_attribute("value") == value).click()

    def submit(self, form: str) -> str:
        """Press a form's button; the words of its status, once there are any."""
        self.driver.find_element("css selector", f"#{form} button").click()
        return self.answer(form)

    def answer(self, form: str) -> str:
        self.until(lambda: self.text(f"{form}-status") not in ("", "Working …"))
        return self.text(f"{form}-status")

    def compare(self, texts: Sequence[str]) -> str:
        self.write("texts", "\n \n".join(texts))
        return self.submit("compare")

    def heat(self) -> np.ndarray:
        """What the cells of the heat map say, (n_texts, n_texts)."""
        cells = "return [...document.querySelectorAll('#heat tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
        return np.array([row[1:] for row in self.script(cells)], float)

    def press(self, *keys: str) -> None:
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def press_with_control(self, key: str) -> None:
        webdriver.ActionChains(self.driver).key_down(Keys.CONTROL).send_keys(key).key_up(Keys.CONTROL).perform()

    def focused(self) -> Any:
        return self.driver.switch_to.active_element

    def emulate(self, *, scheme: str = "light", width: int = 1200) -> None:
        """A colour scheme, and a window's width in CSS pixels."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 800}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def complaints(self) -> list[str]:
        """What the browser's console holds, and forget it."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requested(self) -> list[str]:
        """The addresses that the browser asked, and forget them."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [event["request"]["url"] for event in sent]

    def until(self, condition: Callable[[], bool], timeout_s: float = 20) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, self.driver.find_element("tag name", "body").text
            time.sleep(0.02)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BINARIES[0]
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(BINARIES[1]))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any) -> Page:
    page = Page(browser)
    page.emulate()
    page.complaints()
    page.requested()
    return page


@pytest.fixture(scope="module")
def served(nano_release: Release, nano_f16: Path) -> Iterator[Served]:
    with serving_process("-m", nano_release.file("Q4_0"), "-m", f"{ODD}={nano_f16}") as served:
        yield served


def cosines(url: str, texts: Sequence[str], **options: Any) -> np.ndarray:
    """Of /v1/embeddings' vectors, (n_texts, n_texts)."""
    answer = httpx.post(f"{url}/v1/embeddings", json={"model": "f2llm-nano-Q4_0", "input": texts, **options}).json()
    rows = np.array([item["embedding"] for item in answer["data"]])
    return rows @ rows.T


def test_page_loads_without_complaints_or_requests_elsewhere(page: Page, served: Served) -> None:
    page.open(f"{served.url}/")
    page.compare(TEXTS)
    page.submit("search")
    assert page.complaints() == []
    requested = page.requested()
    assert f"{served.url}/v1/embeddings" in requested
    assert not [url for url in requested if not url.startswith((f"{served.url}/", "data:"))]


def test_policy_lets_only_the_pages_own_script_run(page: Page, served: Served) -> None:
    policy = httpx.get(served.url).headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    page.open(served.url)
    page.complaints()
    tries = (
        "const s = document.createElement('script'); s.append('window.ran = 1'); document.body.append(s)",
        "document.body.setAttribute('onclick', 'window.ran = 1'); document.body.click()",
        "document.body.innerHTML += '<b onclick=1>'",
        "fetch('http://localhost:9/')",
    )
    for attempt in tries:
        page.script(f"try {{ {attempt} }} catch {{ }}")
        page.until(lambda: "action has been blocked" in "".join(page.complaints()))
    assert page.script("return window.ran") is None


def test_drift_is_what_the_files_header_states(page: Page, served: Served, nano_release: Release) -> None:
    stated = drift_of(read_header(nano_release.file("Q4_0")))
    assert stated
    page.open(served.url)
    shown = page.text("drift")
    assert f"{float(f'{100 * stated.mean:.3g}'):g}%" in shown
    assert f"interval ends at {float(f'{100 * stated.upper:.3g}'):g}%" in shown
    assert "Holds the bound of 2%: the mean's 95% interval ends at" in shown
    assert f"over {stated.n_texts} texts" in shown


def test_facts_are_those_of_the_chosen_model(page: Page, served: Served) -> None:
    page.open(served.url)
    page.compare(TEXTS)
    told = {model["id"]: model for model in httpx.get(f"{served.url}/v1/models").json()["data"]}
    for name, variant, selftest in (("f2llm-nano-Q4_0", "Q4_0", "passed"), (ODD, "F16", "not run")):
        page.choose("model", name)
        facts = page.text("facts")
        for fact in (name, told[name]["fingerprint"], told[name]["device"], "32, 64, 128, 256", "2,048", selftest):
            assert fact in facts
        assert page.text("title") == f"f2llm-nano {variant}"
    assert "A reference" in page.text("drift")
    assert not page.shows("heat"), "what was shown was another model's"


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({}, "Drift not measured"),
        ({"mean": 0.03, "upper": 0.031, "bound": 0.02}, "✗ Does not hold the bound of 2%"),
        ({"mean": 0.01, "upper": 0.011, "bound": 0.02}, "a kind of text is over it"),
    ],
)
def test_drift_that_is_unknown_or_over_the_bound_is_said(
    page: Page, nano_f16: Path, stated: dict[str, float], words: str
) -> None:
    values = {f"f2gguf.drift.{key}": value for key, value in stated.items()}
    values |= {"f2gguf.drift.holds": False, "f2gguf.drift.n_texts": 9} if stated else {}
    with Embedder(nano_f16) as model:
        model.header = replace(model.header, values={**model.header.values, **values, "general.file_type": 7})
        with serving_thread(model) as url:
            page.open(url)
            assert words in page.text("drift")


@pytest.mark.parametrize(("role", "width"), [("document", 32), ("query", 256)])
def test_heat_map_has_the_cosines_of_the_embeddings(page: Page, served: Served, role: str, width: int) -> None:
    page.open(served.url)
    page.compare(TEXTS)
    page.choose("role", role)
    page.choose("width", str(width))
    words = page.compare(TEXTS)
    wanted = cosines(served.url, TEXTS, input_type=role, dimensions=width)
    np.testing.assert_allclose(page.heat(), wanted, atol=0.00051)
    i, j = divmod(int(np.argmax(wanted - 9 * np.eye(len(TEXTS)))), len(TEXTS))
    assert f"Closest: {i + 1} and {j + 1}, at {wanted[i, j]:.3f}" in words
    headers = page.script("return [...document.querySelectorAll('#heat tbody th')].map(th => th.title)")
    assert headers == TEXTS


def test_search_ranks_the_texts(page: Page, served: Served, nano_release: Release) -> None:
    page.open(served.url)
    page.write("texts", "\n".join(TEXTS))
    page.write("query", "Bildbearbeitung")
    page.submit("search")
    with Embedder(nano_release.file("Q4_0")) as model:
        scores = model.encode_query("Bildbearbeitung") @ model.encode_document(TEXTS).T
    shown = [item.split("\n") for item in page.script("return [...found.children].map(li => li.innerText)")]
    assert [text for _, text in shown] == [TEXTS[i] for i in np.argsort(-scores)]
    np.testing.assert_allclose([float(score) for score, _ in shown], np.sort(scores)[::-1], atol=0.002)


def test_texts_that_were_cut_are_named(page: Page, served: Served) -> None:
    page.open(served.url)
    page.script("texts.value = 'short\\n' + 'word '.repeat(5000)")
    assert "Cut at 2,048 tokens: text 2." in page.submit("compare")


def test_everything_can_be_done_with_a_keyboard(page: Page, served: Served) -> None:
    page.open(served.url)
    reached = []

    def tab_to(name: str) -> None:
        while not reached or reached[-1] != name:
            page.press(Keys.TAB)
            reached.append(page.focused().get_attribute("id") or page.focused().get_attribute("value"))
            seen = "const e = document.activeElement; return [e, e.parentElement].some(n =>"
            seen += " parseFloat(getComputedStyle(n).outlineWidth) >= 2 && n.getBoundingClientRect().top >= 0)"
            assert page.script(seen), f"focus is not to be seen at {reached[-1]}"
            assert len(reached) < 30, reached

    page.press(Keys.TAB)
    assert page.focused().text == "Skip to the texts"
    page.press(Keys.ENTER)
    tab_to("texts")
    assert reached == ["texts"], "the skip link passes over the header"
    page.press_with_control("a")
    page.press("one text", Keys.ENTER, "another text")
    page.press_with_control(Keys.ENTER)
    assert page.answer("compare").startswith("2 texts.")
    tab_to("role")
    page.press("q")
    tab_to("width")
    page.press("3", Keys.TAB, Keys.ENTER)
    assert page.answer("compare").startswith("2 texts.")
    tab_to("heat")
    tab_to("query")
    page.press_with_control("a")
    page.press("one", Keys.ENTER)
    assert page.answer("search").startswith("2 texts")
    tab_to("curl")
    page.press(Keys.ARROW_RIGHT)
    for words in (":query", "dimensions=32", "from openai import"):
        assert words in page.text("snippet")
    tab_to("copy")
    page.press(Keys.ENTER)
    page.until(lambda: page.text("copy-status") != "")
    unnamed = "return [...document.querySelectorAll('input, select, textarea')].filter(e => !e.labels.length).length"
    assert page.script(unnamed) == 0


def test_what_fits_where_is_worked_out_when_asked(page: Page, served: Served) -> None:
    page.open(served.url)
    assert not page.shows("fits")
    page.find("fit").click()
    page.until(lambda: page.shows("fits"))
    names = [device["name"] for device in next(iter(httpx.get(f"{served.url}/fit").json().values()))["devices"]]
    assert page.script("return [...document.querySelectorAll('#fits tbody th')].map(node => node.textContent)") == names
    assert re.match(r"With texts of up to 512 tokens: [\d.]+ MB on a processor", page.text("fit-status"))
    assert "not known" in page.text("fits")


def test_a_phone_scrolls_the_table_and_not_the_page(page: Page, served: Served) -> None:
    page.emulate(width=390)
    page.open(served.url)
    page.compare([*TEXTS, "x" * 300, *map(str, range(12))])
    page.submit("search")
    for language in page.script("return [...languages.querySelectorAll('input')].map(e => e.value)"):
        page.script("languages.querySelector(`[value='${arguments[0]}']`).click()", language)
        assert page.script("return document.documentElement.scrollWidth") == 390
    assert page.script("return heat.scrollWidth > heat.clientWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(page: Page, served: Served, scheme: str) -> None:
    page.emulate(scheme=scheme)
    page.open(served.url)
    page.compare(TEXTS)
    page.write("query", "")
    page.submit("search")  # an error
    shown = page.script(
        CONTRASTS + "return [...document.querySelectorAll('body *')].filter(node => node.checkVisibility()"
        " && !['SCRIPT', 'OPTION'].includes(node.tagName) && [...node.childNodes].some(c => c.nodeType === 3"
        " && c.data.trim())).map(node => [node.tagName, node.className, node.textContent.slice(0, 30), contrast(node)])"
    )
    assert len(shown) > 60
    assert [found for found in shown if found[-1] < 4.5] == []
    sweep = "const cell = heat.querySelector('.shade'); return Array.from({ length: 101 }, (_, i) => {"
    sweep += "cell.style.setProperty('--p', i / 100); return [contrast(cell), luminance(behind(cell))] })"
    contrasts, luminances = np.array(page.script(CONTRASTS + sweep)).T
    assert contrasts.min() >= 4.5
    assert (np.diff(luminances) * (1 if scheme == "dark" else -1) > 0).all(), "lightness orders the values"


def test_keys_are_asked_for_and_kept_in_the_tab(page: Page, nano: Embedder) -> None:
    with serving_thread(nano, Limits(api_keys=("secret-key",))) as url:
        page.open(url)
        page.until(lambda: page.text("server") == "This server wants a key.")
        assert not page.shows("main")
        assert page.focused().get_attribute("id") == "key"
        page.press("wrong", Keys.ENTER)
        page.until(lambda: "does not know this key" in page.text("server"))
        page.press("secret-key", Keys.ENTER)
        page.until(lambda: page.shows("main"))
        assert not page.shows("key-form")
        assert not page.shows("api"), "a link to the schema would be refused: it sends no key"
        assert page.compare(TEXTS).startswith("4 texts")
        assert "$F2GGUF_API_KEY" in page.text("snippet")
        assert "secret-key" not in page.driver.page_source
        assert page.script("return [localStorage.length, document.cookie]") == [0, ""]
        page.open(url)
        assert page.shows("main"), "the tab remembers it"
        page.script("window.open(arguments[0], '_blank', 'noopener')", url)
        first, second = page.driver.window_handles
        page.driver.switch_to.window(second)
        page.until(lambda: page.text("server") == "This server wants a key.")
        page.driver.close()
        page.driver.switch_to.window(first)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Limits(max_requests=0), "The server is busy. Try again in 1 s."),
        (Limits(max_body_bytes=100), "more than the server takes at once"),
        (Limits(max_texts=1), "It says: 4 texts: a request may have 1."),
    ],
)
def test_refusals_are_told_in_words(page: Page, nano: Embedder, settings: Limits, words: str) -> None:
    with serving_thread(nano, settings) as url:
        page.open(url)
        for form in ("compare", "search"):
            page.write("texts", "\n".join(TEXTS))
            assert words in page.submit(form)
            assert "bad" in page.find(f"{form}-status").get_attribute("class")
    assert "Is it still running?" in page.submit("compare"), "the server is gone"


def test_a_server_that_is_gone_can_be_asked_again(page: Page, served: Served) -> None:
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/v1/models"]})
    try:
        page.open(served.url)
        assert "Is it still running?" in page.text("server")
    finally:
        page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
    page.find("again").click()
    page.until(lambda: page.shows("main"))


def test_an_answer_for_another_width_comes_too_late(page: Page, nano: Embedder) -> None:
    def slow(texts: list[Any], prompt: Any, **_: Any) -> np.ndarray:
        time.sleep(0.5)
        return np.ones((len(texts), 256), np.float32)

    with serving_thread(nano, compute=slow) as url:
        page.open(url)
        page.driver.find_element("css selector", "#compare button").click()
        page.choose("width", "32")
        time.sleep(1.0)
        assert (page.shows("heat"), page.text("compare-status")) == (False, "")


@pytest.mark.parametrize("language", ["curl", "Python: openai", "Python: langchain-openai", "JavaScript: fetch"])
def test_snippets_run_as_they_are(page: Page, served: Served, nano: Embedder, language: str) -> None:
    page.open(served.url)
    page.choose("model", ODD)
    page.choose("width", "64")
    page.script("languages.querySelector(`[value='${arguments[0]}']`).click()", language)
    snippet = page.text("snippet")
    wanted = nano.encode_document(["first text", "second text"], truncate_dim=64)
    np.testing.assert_allclose(_RUN[language](snippet, page), wanted, atol=1e-6)


def _curl(snippet: str, page: Page) -> Any:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    answer = subprocess.run(["sh", "-c", snippet], check=True, capture_output=True).stdout
    return [item["embedding"] for item in json.loads(answer)["data"]]


def _python(snippet: str, page: Page) -> Any:
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of langchain's imports
        exec(snippet, names)
        vectors = names.pop("vectors")
        names.clear()
        gc.collect()  # clients that nobody closed
    return vectors


def _javascript(snippet: str, page: Page) -> Any:
    return page.driver.execute_async_script(f"(async done => {{ {snippet}\ndone(vectors); }})(arguments[0])")


_RUN = {
    "curl": _curl,
    "Python: openai": _python,
    "Python: langchain-openai": _python,
    "JavaScript: fetch": _javascript,
}
