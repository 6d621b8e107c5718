"""Screenshots of a report: PYTHONPATH=tests python tests/report/browser_screenshots.py HTML FOLDER

Writes light.png, dark.png, phone.png and phone-dark.png (the whole page), top.png (its beginning,
for the README) and print.pdf. Debian's fonts-inter makes the page look as it does on most screens.
"""

import sys
from pathlib import Path

from cases.chromium import browser

FORMS = {
    "light": (1200, "light"),
    "dark": (1200, "dark"),
    "phone": (390, "light"),
    "phone-dark": (390, "dark"),
}


def main(report: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with browser() as chromium:
        for name, (width, scheme) in FORMS.items():
            chromium.open(report, width, 900, scheme)
            chromium.screenshot(folder / f"{name}.png")
        chromium.open(report, 960, 1240)
        chromium.screenshot(folder / "top.png", whole=False)
        chromium.print(folder / "print.pdf")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
