"""adoption.html: whole, well-formed, without outside resources, and with everything that was found."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

from adoption import sample
from anyflash.adoption import claims, markdown, page

VOID = {"meta", "br"}


class Balance(HTMLParser):
    """Every element closed in order; gathers tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(html: str) -> Balance:
    found = Balance()
    found.feed(html)
    found.close()
    assert not found.open
    return found


def test_whole_page() -> None:
    report = sample.report(quick=True)
    html = page.render(report)
    found = parsed(html)
    machine = report["machine"]
    expected = [machine["cpu"], machine["date"].replace("T", " "), *machine["versions"].values()]
    expected += ["A quick run", "1.59×", "0.90×", "398 ms", "71 MiB", "pip install 'it>=1,<2'"]
    expected += ["RuntimeError: our <outputs> err", "line <1>", "A <system>", *report["how"]]
    expected = [
        *expected,
        "3 training steps",
        "at most 1.0e-02, of 1.75 gained",
        "Longest in 512 MiB beside the input, in residues: eager 224, sdpa 480, anyflash at least 2048.",
        claims.CLAIMS["PyTorch"].text,
    ]
    for text in expected:
        assert text in found.text, text
    assert found.tags.count("svg") == 2 + 2 * 3 + 1
    assert found.tags.count("polyline") == 3
    assert found.text.count("anyflash") >= 3


def test_no_outside_resource() -> None:
    html = page.render(sample.report())
    assert not re.search(r"https?://|@import|url\(", html)
    assert not {"src", "href"} & {name for name, _ in parsed(html).attributes}
    assert "script" not in parsed(html).tags


def test_markdown(tmp_path: Path) -> None:
    """Everything that the page says is in the report, and every chart that it shows is a whole file."""
    report = sample.report()
    file = tmp_path / "docs" / "found.md"
    written = markdown.write(report, file)
    text = file.read_text()
    for wanted in (
        *report["how"],
        report["machine"]["cpu"],
        "1.59×",
        "398 ms",
        "RuntimeError: our <outputs> err",
        "`pip install 'it>=1,<2'`",
        claims.CLAIMS["PyTorch"].text,
        "anyflash at least 2048.",
    ):
        assert wanted in text
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert shown == ["found-speed.svg", "found-memory.svg", "found-packed.svg"]
    assert written == [file, *(file.with_name(name) for name in shown)]
    for chart in written[1:]:
        root = ElementTree.parse(chart).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert int(root.attrib["width"]) > 0


def test_nothing_measured() -> None:
    report = sample.report()
    report["rows"] = [r for r in report["rows"] if r["status"] == "absent"]
    assert "Not installed here" in parsed(page.render(report)).text
