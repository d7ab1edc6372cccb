"""JupyterLab on loopback and a headless Chromium: a page for each notebook, on a small drawn root."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from fsc147lib.data import make_dataset
from fsc147lib.report.workbook import Settings
from fsc147lib.training import TrainConfig, train

HERE = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PICTURES = HERE / "runs" / "browser"  # what the tests saw, to be looked at


@pytest.fixture(scope="session")
def places(tmp_path_factory) -> Settings:
    """A drawn root, and two runs on it as notebook 03 makes them."""
    pytest.importorskip("playwright", reason="the browser's tests need playwright")
    if CHROMIUM is None:
        pytest.skip("the browser's tests need Chromium: apt-get install chromium")
    folder = tmp_path_factory.mktemp("lab")
    places = Settings(make_dataset(folder / "root", 6, 12, 2, seed=3), "tiny", folder / "out")
    for name, weight in (("counts", 0.0), ("both", 1.0)):
        train(TrainConfig(
            places.data, places.new_run(name), epochs=1, limit=6, learning_rate=3e-3, attention_weight=weight,
            tracking="disabled",
        ))  # fmt: skip
    return places


@pytest.fixture(scope="session")
def lab(places):
    """Address of a JupyterLab whose folder holds the notebooks' cells that open the viewer."""
    folder, data = places.out.parent, places.data
    for name, first, wanted in (("01_inspect_data", 4, "figure()"), ("04_attention_maps", 2, "figure()")):
        notebook = json.loads((HERE / "notebooks" / f"{name}.ipynb").read_text())
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        opened = next(i for i, cell in enumerate(cells) if "viewer.Viewer(" in "".join(cell["source"]))
        assert wanted in "".join(cells[opened + 1]["source"]), "a static twin stands beside the widget"
        notebook["cells"] = cells[:first] + cells[opened : opened + 1]
        for cell in notebook["cells"]:
            cell.update(outputs=[], execution_count=None)
        (folder / f"{name}.ipynb").write_text(json.dumps(notebook))
    quiet = folder / "settings" / "@jupyterlab" / "apputils-extension"
    quiet.mkdir(parents=True)
    (quiet / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(8)
    environment = {
        **os.environ, "FSC147_DATA": str(data), "FSC147_OUT": str(folder / "out"), "TQDM_DISABLE": "1",
        "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}", "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "IPYTHONDIR": str(folder / "ipython"), "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
    }  # fmt: skip
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=None", "--ServerApp.port_retries=0",
    ]  # fmt: skip
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, folder / "lab.log")
        yield f"http://127.0.0.1:{port}/lab/tree/NOTEBOOK?token={token}&reset"
    finally:
        server.terminate()  # and with it its kernels
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def _wait_for(url: str, server: subprocess.Popen, log: Path, seconds: float = 60) -> None:
    for _ in range(int(4 * seconds)):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            return urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(0.25)
    raise AssertionError(f"JupyterLab does not answer: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")  # or its event loop would run on beside the tests that come after
def browser(lab):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield started
        started.close()


@pytest.fixture(scope="module")
def open_notebook(lab, browser):
    """A function that opens a notebook, runs its cells and returns the page once the viewer has drawn."""

    def opened(name: str):
        page = browser.new_page(viewport={"width": 1500, "height": 1300})
        page.set_default_timeout(60_000)
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(lab.replace("NOTEBOOK", name))
        page.wait_for_function("window.jupyterapp?.shell.currentWidget?.context?.isReady")
        page.wait_for_selector(".jp-NotebookPanel .jp-Notebook")
        page.wait_for_function(
            "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'"
        )
        for command in ("application:toggle-left-area", "notebook:run-all-cells"):
            page.evaluate("name => void window.jupyterapp.commands.execute(name)", command)  # and do not wait for it
        page.wait_for_selector(".fsc-viewer[data-version]", timeout=120_000)
        page.locator(".fsc-viewer").scroll_into_view_if_needed()
        return page

    return opened


@pytest.fixture
def keep(request):
    """A function that keeps a picture of the viewer under the test's name."""

    def kept(page, name: str) -> None:
        PICTURES.mkdir(parents=True, exist_ok=True)
        page.locator(".jp-OutputArea-output:has(.fsc-viewer)").screenshot(path=PICTURES / f"{name}.png")

    return kept
