"""The browser of this machine, for tests of pages."""

import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """Its path; None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)
