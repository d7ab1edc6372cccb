"""The viewer in a real browser: each control is moved, cells are dragged over, a picture is brought along."""

import io
import re

import pytest
from PIL import Image

from fsc147lib.model import load_model, look

pytestmark = pytest.mark.medium

CHANGE = """([name, index]) => new Promise((resolve, reject) => {
  const root = document.querySelector('.fsc-viewer'), started = performance.now();
  const select = [...document.querySelectorAll('.widget-dropdown')].find(
    node => node.querySelector('label').textContent === name).querySelector('select');
  new MutationObserver((_, watcher) => {
    watcher.disconnect();
    requestAnimationFrame(() => resolve(performance.now() - started));
  }).observe(root, { attributes: true, attributeFilter: ['data-version'] });
  if (select.selectedIndex === index) return resolve(0);
  setTimeout(() => reject(new Error(`nothing was drawn after a change of ${name}`)), 20000);
  select.selectedIndex = index;
  select.dispatchEvent(new Event('change', { bubbles: true }));
})"""  # milliseconds from the choice to the first frame after it was drawn


@pytest.fixture(scope="module")
def page(open_notebook):
    """Notebook 04's viewer with its distribution, so that nothing is under way."""
    page = open_notebook("04_attention_maps.ipynb")
    page.wait_for_selector("svg[data-plot=distribution]")
    yield page
    assert not page.errors


def settled(page, act) -> None:
    """Do something in the page and wait until the kernel's answer, and the distribution after it, is drawn."""
    before = version(page)
    act()
    page.wait_for_function(f"+document.querySelector('.fsc-viewer').dataset.version > {before}")
    page.wait_for_selector("svg[data-plot=distribution]")


def version(page) -> int:
    return int(page.locator(".fsc-viewer").get_attribute("data-version"))


def choose(page, name: str, index: int) -> None:
    """Choose in a menu, and wait for the distribution too, which follows the maps."""
    page.evaluate(CHANGE, [name, index])
    menu = page.locator(".widget-dropdown", has=page.get_by_text(name, exact=True)).locator("select")
    assert menu.evaluate("select => select.selectedIndex") == index
    if page.locator(".widget-dropdown").count() > 2:  # there is a model
        page.wait_for_selector("svg[data-plot=distribution]")


def options(page, name: str) -> list[str]:
    menu = page.locator(".widget-dropdown", has=page.get_by_text(name, exact=True))
    return [text.replace("\xa0", " ") for text in menu.locator("option").all_inner_texts()]


def drawn(page, panel: str) -> bytes:
    return page.locator(f"[data-panel={panel}]").screenshot()


def facts(page) -> str:
    return page.locator(".fsc-viewer .facts").inner_text()


def open_largest(page) -> None:
    """The picture with most objects: its answer has two digits."""
    for name in ("model", "method", "layers", "heads", "word", "answer", "category", "sort"):
        choose(page, name, 0)
    choose(page, "sort", 1)


def test_it_opens_with_answer_scores_scale_and_plots(page, keep):
    assert re.search(r"\.jpg: \d+ .+\nboth losses: 'COUNT: .*\nKL [\d.]+ nats, mass on objects \d+%", facts(page))
    assert page.locator(".view:visible").count() == 4 and page.locator(".strip img").count() == 9
    assert page.locator("svg[data-plot=against-truth] circle").count() >= 9
    keep(page, "opened")


def test_it_shows_one_s_own_runs(page, places):
    """The newest runs of notebook 03 are named, and the answer is that of the run with both losses."""
    named = page.locator(".jp-OutputArea-output", has_text="counts: ").inner_text()
    assert "both-1/last" in named and "counts-1/last" in named
    sample = next(sample for sample in places.samples("val") if sample.name == facts(page).split(":")[0])
    (answer,) = look(load_model(places.newest("both")), [sample]).answers
    assert f"both losses: {answer!r}" in facts(page)


def test_each_menu_changes_the_page(page, keep):
    open_largest(page)
    counts = [int(re.search(r"of (\d+) ", title)[1]) for title in titles(page)]
    assert counts == sorted(counts, reverse=True)
    before = drawn(page, "map")
    choose(page, "model", 1)
    assert drawn(page, "map") != before
    caption = page.locator("figure:has([data-panel=map]) figcaption")
    gradient = options(page, "method").index("token_gradient")
    choose(page, "sort", 2)  # by its error: its own answer is not the true one
    for name, index in (("layers", 2), ("heads", 1), ("answer", 1), ("word", 3), ("method", gradient)):
        before = caption.inner_text(), drawn(page, "map")  # another answer of one digit has the same map
        choose(page, name, index)
        changed = (caption.inner_text(), drawn(page, "map")) != before
        assert changed, name
    assert caption.inner_text().startswith("token_gradient, true answer ")
    assert not page.locator(".widget-dropdown", has=page.get_by_text("layers", exact=True)).is_visible()
    assert page.locator(".atlas").count() == 0
    keep(page, "token-gradient")
    for name, index in (("method", 0), ("word", 0), ("answer", 0), ("heads", 0), ("layers", 0), ("model", 0)):
        choose(page, name, index)
    category = options(page, "category")[1]
    choose(page, "category", 1)
    assert {title.split(" ", 3)[-1] for title in titles(page)} == {category}
    choose(page, "category", 0)
    choose(page, "sort", 2)
    assert page.locator(".strip button.chosen").count() == 1


def titles(page) -> list[str]:
    return [button.get_attribute("title") for button in page.locator(".strip button:has(img)").all()]


def test_opacity_and_panels_need_no_kernel(page):
    before, seen = version(page), drawn(page, "map")
    page.locator("input[type=range]").fill("0.2")
    assert drawn(page, "map") != seen
    page.locator("input[data-show=photograph]").uncheck()
    page.locator("input[data-show=difference]").uncheck()
    assert page.locator(".view:visible").count() == 2
    page.locator("input[data-show=photograph]").check()
    page.locator("input[data-show=difference]").check()
    page.locator("input[type=range]").fill("0.6")
    assert version(page) == before and drawn(page, "map") == seen


def test_the_cell_under_the_pointer_is_told(page):
    box = page.locator("[data-panel=target]").bounding_box()
    page.mouse.move(box["x"] + 2.5 * box["width"] / 14, box["y"] + 3)
    told = page.locator(".fsc-viewer .readout").inner_text()
    assert re.fullmatch(r"row 1, column 3: target [\d.e-]+, map [\d.e-]+, difference -?[\d.e-]+", told)


def test_thumbnails_points_and_the_atlas_are_clicked(page):
    open_largest(page)
    settled(page, lambda: page.locator(".strip button:has(img)").nth(4).click())
    name = facts(page).split(":")[0]
    place = page.locator(".strip button.chosen").get_attribute("data-place")
    assert page.locator(".strip button:has(img)").nth(4).get_attribute("data-place") == place
    other = f"svg[data-plot=against-truth] circle:not([data-place='{place}'])"
    settled(page, lambda: page.locator(other).first.click(force=True))
    assert facts(page).split(":")[0] != name
    box = page.locator(".atlas").bounding_box()
    settled(page, lambda: page.mouse.click(box["x"] + 1.5 * box["width"] / 4, box["y"] + 3.5 * box["height"] / 4))
    page.wait_for_function("""[['layers', '3'], ['heads', '1']].every(([name, value]) => {
        const menu = [...document.querySelectorAll('.widget-dropdown')].find(n => n.innerText.startsWith(name));
        return menu.querySelector('select').selectedOptions[0].text === value; })""")
    settled(page, lambda: page.locator(".strip button.turn").nth(1).click())
    assert "10 to " in page.locator(".strip").inner_text()
    for menu in ("layers", "heads"):
        choose(page, menu, 0)
    assert page.get_by_role("alert").inner_text() == ""


def test_cells_are_hidden_and_the_rest_is_counted(page, keep):
    open_largest(page)
    box = page.locator("[data-panel=photograph]").bounding_box()
    page.mouse.move(box["x"] + 2, box["y"] + 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 3, box["y"] + box["height"] / 4, steps=4)
    settled(
        page, lambda: (page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2 - 4), page.mouse.up())
    )
    told = facts(page)
    assert re.search(
        r"98 of 196 cells hidden: 'COUNT: .*\nthe mean moves by [+-][\d.]+, the dots by -\d+: \d+ of \d+ are left", told
    )
    assert page.locator("svg rect[data-of='the rest']").count() > 0
    keep(page, "hidden")
    settled(page, lambda: page.get_by_role("button", name="show all cells").click())
    assert "hidden" not in facts(page) and page.locator("svg rect[data-of='the rest']").count() == 0


def picture() -> bytes:
    file = io.BytesIO()
    Image.effect_mandelbrot((400, 300), (-2, -1, 1, 1), 40).convert("RGB").save(file, "png")
    return file.getvalue()


def test_a_picture_of_ones_own_is_uploaded_or_dropped(page, keep):
    page.locator(".widget-text input").fill("spots for $2 and $3")
    page.locator(".widget-text input").press("Tab")
    chosen = page.locator(".fsc-viewer input[type=file]")
    for name, content, sentence in (
        ("broken.png", picture()[:200], "broken.png cannot be used as a picture"),
        ("empty.png", b"", "empty.png cannot be used as a picture (the file is empty)"),
        ("huge.png", bytes(9_000_000), "huge.png has 9 MB, more than the 8 that go through"),
    ):
        chosen.set_input_files({"name": name, "mimeType": "image/png", "buffer": content})
        page.get_by_role("alert").filter(has_text=sentence).wait_for()
    chosen.set_input_files({"name": "mine.png", "mimeType": "image/png", "buffer": picture()})
    page.wait_for_function("document.querySelector('.facts').innerText.startsWith('mine.png: spots for $2 and $3')")
    assert page.get_by_role("alert").inner_text() == "" and options(page, "answer") == ["own"]
    assert page.locator(".view:visible").count() == 2
    page.wait_for_selector("svg[data-plot=distribution]")
    keep(page, "own-picture")
    page.evaluate("""bytes => {
        const files = new DataTransfer();
        files.items.add(new File([new Uint8Array(bytes)], 'dropped.png', { type: 'image/png' }));
        document.querySelector('.fsc-viewer').dispatchEvent(
            new DragEvent('drop', { dataTransfer: files, bubbles: true, cancelable: true }));
    }""", list(picture()))  # fmt: skip
    page.wait_for_function("document.querySelector('.facts').innerText.startsWith('dropped.png')")
    page.wait_for_selector("svg[data-plot=distribution]")


def test_without_a_model_photographs_and_targets_are_shown(open_notebook, keep):
    page = open_notebook("01_inspect_data.ipynb")
    assert page.locator(".widget-dropdown").count() == 2 and page.locator(".view:visible").count() == 2
    first = facts(page)
    choose(page, "sort", 1)
    assert facts(page) != first and page.locator(".strip button.chosen").count() == 1
    assert page.locator("svg[data-plot]").count() == 0
    keep(page, "without-model")
    assert not page.errors
