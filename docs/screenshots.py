"""Opens TensorBoard's dashboards in a browser without a screen, as the tests do, and takes the screenshots of the docs.

    .venv/bin/python docs/screenshots.py runs/digits/version_0

It needs Debian's packages chromium and chromium-driver, and the extra ``test``.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM, CHROMEDRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-dev-shm-usage",
)
SIZES = {"custom_scalars": (1500, 1780), "images": (1600, 1500), "text": (1400, 1430), "hparams": (2350, 620)}
"""The dashboards in the docs, with the width and the height of the window."""

# The words and images of a page. What TensorBoard shows is in shadow trees, which `find_element` does not look into.
CONTENT = """
const words = [], images = [];
(function walk(node) {
    if (node.nodeType === Node.TEXT_NODE && node.textContent.trim()) words.push(node.textContent.trim());
    if (["STYLE", "SCRIPT", "TEMPLATE"].includes(node.tagName)) return;
    if (node.tagName === "IMG" && node.naturalWidth > 0) images.push(node.src);
    if (node.shadowRoot) walk(node.shadowRoot);
    node.childNodes.forEach(walk);
})(document.body);
return [words.join("\\n"), images];
"""


@contextmanager
def tensorboard(logdir: str | os.PathLike[str]) -> Iterator[str]:
    """A TensorBoard of these logs in a process of its own, on a free port of this machine; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--logdir", os.fspath(logdir), "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", *arguments], stdout=output, stderr=subprocess.STDOUT
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(f"{address}/data/runs", process)
            yield address
        finally:
            process.terminate()
            process.wait(30)


def _wait_for(address: str, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Until the server answers with the runs that it has read."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"TensorBoard ended with code {process.returncode}.")
        try:
            with urllib.request.urlopen(address) as answer:
                if answer.read().strip() != b"[]":
                    return
        except OSError:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"TensorBoard did not answer within {seconds:g} seconds.")


@contextmanager
def browser(profile: str | os.PathLike[str], width: int = 1600, height: int = 1200) -> Iterator[Any]:
    """Chromium without a screen; the profile is a folder for what it keeps."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)  # named, so that selenium does not look for one in the network
    for flag in (*FLAGS, f"--window-size={width},{height}", f"--user-data-dir={os.fspath(profile)}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(str(CHROMEDRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


def content(driver: Any) -> tuple[str, list[str]]:
    """The words of the page, and the addresses of the images that have been loaded."""
    words, images = driver.execute_script(CONTENT)
    return words, images


def open_dashboard(driver: Any, address: str, name: str, words: Sequence[str], images: int = 0, wait: int = 90) -> None:
    """Open a dashboard, and wait until it shows these words and so many images.

    Raises:
        TimeoutError: If it does not, with what it shows instead.
    """
    driver.get(f"{address}/#{name}")
    driver.refresh()  # the address without what stands behind # is the same, so it would not be loaded again
    end = time.monotonic() + wait
    while time.monotonic() < end:
        shown, loaded = content(driver)
        missing = [word for word in words if word not in shown]
        if not missing and len(loaded) >= images:
            return
        time.sleep(1)
    raise TimeoutError(f"{name} does not show {missing}, or {len(loaded)} of {images} images. It shows:\n{shown}")


def main(logdir: str, folder: Path = Path(__file__).parent / "images") -> None:
    """Take the screenshots from the logs of the demo."""
    with tempfile.TemporaryDirectory() as profile, tensorboard(logdir) as address, browser(profile) as driver:
        for name, size in SIZES.items():
            driver.set_window_size(*size)
            open_dashboard(driver, address, name, words=[], images=3 if name == "images" else 0)
            time.sleep(10)  # for the charts, which are drawn with a movement
            path = folder / f"tensorboard_{name}.png"
            driver.save_screenshot(str(path))
            _shrink(path)
            print(f"{path}: {path.stat().st_size:,} bytes")


def _shrink(path: Path) -> None:
    """To a palette, which screenshots fit into."""
    from PIL import Image

    with Image.open(path) as image:
        smaller = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    smaller.save(path, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:2])
