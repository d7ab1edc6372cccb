"""The viewer in a real browser."""

import pytest


@pytest.fixture(scope="module")
def page(open_notebook):
    return open_notebook("04_attention_maps.ipynb")


def test_it_opens(page, keep):
    page.wait_for_selector("svg[data-plot=distribution]")
    keep(page, "opened")
    page.screenshot(path="/tmp/full.png")
    assert not page.errors
