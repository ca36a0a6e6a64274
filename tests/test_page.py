"""`tta ask --page`: a browser labels predictions of a live daemon."""

import json
import shutil
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.waiting import until
from tta.packaging.digits import corrupt, digits
from tta.scenario import DaemonProcess

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage")


@pytest.fixture
def answered(start_daemon: Callable[..., DaemonProcess]) -> DaemonProcess:
    """A daemon that has answered forty noisy digits."""
    daemon = start_daemon(mode="off")
    x, _ = digits("stream", 40, seed=31)
    with daemon.client() as client:
        client.predict(corrupt(x, "noise", 1))
        until(lambda: len(client.ask(40)) == 40, "the predictions reach the daemon")
    return daemon


@pytest.fixture
def url(answered: DaemonProcess) -> Iterator[str]:
    """Where the page is."""
    command = [sys.executable, "-m", "tta", "ask", "--page", "-n", "8", "--json", "--control", answered.control]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield json.loads("".join(process.stdout.readline() for _ in range(3)))["url"]
        process.terminate()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    """A real one, without a window."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium and chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'browser'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def stored(daemon: DaemonProcess) -> list[tuple[int, int | None, int, int]]:
    """Prediction id, label, predicted and whether it was asked for, of the labels on disk."""
    with sqlite3.connect(daemon.folder / "state" / "labels.sqlite") as db:
        return db.execute("SELECT prediction_id, label, predicted, asked FROM labels").fetchall()


def test_a_browser_labels_by_keys(answered: DaemonProcess, url: str, browser: webdriver.Chrome) -> None:
    """A digit names the class, Enter confirms, minus says wrong, Backspace takes the last one back."""
    browser.get(url)
    body = browser.find_element(By.TAG_NAME, "body")
    picture = browser.find_element(By.ID, "picture")

    def press(key: str, said: str) -> None:
        shown = picture.get_attribute("src")
        body.send_keys(key)
        until(lambda: browser.find_element(By.ID, "said").text == said, said, 20)
        until(lambda: picture.get_attribute("src") != shown, "the next picture", 20)

    until(picture.is_displayed, "a picture", 20)
    predicted = browser.find_element(By.CSS_SELECTOR, "button.predicted").get_attribute("title")
    press(Keys.ENTER, f"{predicted}: joined")
    first = stored(answered)
    press("3", "3: joined")
    press(Keys.BACK_SPACE, "back: another label replaces the one sent")
    press("4", "4: joined")
    press(" ", "skipped")
    press("-", "wrong: joined")
    rows = {row[0]: row for row in stored(answered)}

    assert [str(row[1]) for row in first] == [predicted]
    assert first[0][1] == first[0][2]
    assert len(rows) == 3
    assert sorted((row[1] is None, row[1] == 4) for row in rows.values() if row[0] != first[0][0]) == [
        (False, True),
        (True, False),
    ]
    assert all(row[3] for row in rows.values())
    assert browser.find_element(By.ID, "count").text.endswith("4 from here")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_page_is_for_who_has_its_address(answered: DaemonProcess, url: str) -> None:
    """Another address, another body, a label that is no class: refused, each with its code; nothing is stored."""
    root = url[: url.index("/", len("http://"))]
    good = {"prediction_id": "1", "label": 3}

    def status(address: str, body: bytes | None = None) -> int:
        try:
            with urllib.request.urlopen(urllib.request.Request(address, body), timeout=10) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return error.code

    assert status(url) == 200
    assert status(root + "/") == status(root + "/questions") == 404
    assert status(root + "/labels", json.dumps(good).encode()) == 404
    assert status(url + "labels", b"no JSON") == 400
    assert status(url + "labels", json.dumps({**good, "prediction_id": "x"}).encode()) == 400
    assert status(url + "labels", bytes(1 << 17)) == 413
    asked = json.load(urllib.request.urlopen(url + "questions", timeout=10))["questions"]
    known = {"prediction_id": asked[0]["prediction_id"], "label": 10}
    assert status(url + "labels", json.dumps(known).encode()) == 400
    assert stored(answered) == []


def test_questions_come_with_their_images(answered: DaemonProcess) -> None:
    """`ask` with images sends what was predicted, bit by bit, at most 64 of them, and the same order without."""
    x, _ = digits("stream", 40, seed=31)
    noisy = {image.tobytes() for image in corrupt(x, "noise", 1)}
    with answered.client() as client:
        with_images = client.ask(100, images=True)
        without = client.ask(100)
        first = {q.prediction_id: q for q in with_images}
        answer = client.predict(np.stack([q.image for q in with_images]))

    assert {q.image.tobytes() for q in with_images if q.image is not None} == noisy
    assert [q.prediction_id for q in without] == list(first)
    assert all(q.image is None for q in without)
    assert answer.classes.tolist() == [q.predicted for q in with_images]
