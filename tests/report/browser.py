"""A headless Chromium for the tests of pages; they are skipped where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

OWN = Path(__file__).parents[2] / ".chromium" / "bin" / "chromium"
_NAMES = ("chromium", "chromium-headless-shell", "google-chrome")


def program() -> str | None:
    """The browser's path: the one of `scripts/setup_chromium.sh`, or the system's."""
    if OWN.is_file():
        return str(OWN)
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


@contextmanager
def started() -> Iterator[Any]:
    """Playwright's browser; skips where it or Chromium is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: scripts/setup.sh dev")
    path = program()
    if path is None:
        pytest.skip("no Chromium here: bash scripts/setup_chromium.sh")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


class Watched:
    """A page with what it asked for and complained of."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = file.absolute().as_uri()
        self.page.goto(self.url)

    def axe(self) -> list[str]:
        """Serious and critical findings of axe-core, one line each."""
        source = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text("utf-8")
        self.page.evaluate(source)
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        return [
            f"{one['id']}: {node['html'][:150]}"
            for one in found["violations"]
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"]
        ]
