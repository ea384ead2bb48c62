"""Writes docs/supported.md: what works, what is refused and what could not be tried, as the tests found it.

    python -m tests.support_table            runs tests/attention, tests/recurrent and tests/tuner, and writes the page
    python -m tests.support_table --check    writes nothing, and fails where the page says something else

A test is a part of the page if it is marked `@pytest.mark.supports(section, what, on=…)`: a row, and what the row was
tried on. These texts may name parameters of the test (`"{name}"`). `refused=True` marks tests of an error that says
why not; a test may also say its outcome itself (`record_property("outcome", …)`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "supported.md"
FOLDERS = [str(Path(__file__).parent / name) for name in ("attention", "recurrent", "tuner")]

_HEAD = """# What is supported

*Generated from the tests by `python -m tests.support_table`; do not edit.*

✓ means that the tests of the row pass, on tiny random models of the architectures named. Where there are numbers to
compare they are held against plain transformers (`past_key_values`) in float32, to 1e-4; on quantized bases to 1e-2;
under autocast the direction of the gradient is compared; of a trainer it is tested that two steps move the trainable
tokens of the cartridge, and nothing else. What the rows mean is in [tuner.md](tuner.md).

While a prefix is active this package's kernels compute the attention, whichever implementation the model was loaded
with; the implementation decides how the model states its masks, and that is what the rows on back ends are about.
"""


class SupportTable:
    """A pytest plugin: collects the outcomes of marked tests."""

    def __init__(self) -> None:
        # section -> what -> outcome ("✓", "refused", "not tried: …") -> on what, in the order of the tests
        self.sections: dict[str, dict[str, dict[str, list[str]]]] = {}
        self.failed = False

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: pytest.CallInfo[None]) -> Iterator[None]:
        report = (yield).get_result()
        self.failed |= report.failed
        marker = item.get_closest_marker("supports")
        if marker is None or (report.when != "call" and not report.skipped):
            return
        parameters = getattr(item, "callspec", None)
        section, what, on = (
            _filled(text, {} if parameters is None else parameters.params)
            for text in (*marker.args, marker.kwargs.get("on", ""))
        )
        cell = self.sections.setdefault(section, {}).setdefault(what, {})
        values = cell.setdefault(_outcome(report, marker), [])
        if on not in values:
            values.append(on)

    def page(self) -> str:
        parts = [_HEAD]
        for section, rows in sorted(self.sections.items()):
            parts.append(f"\n## {section}\n\n| what | how it is |\n| --- | --- |\n")
            for what, cell in rows.items():
                outcomes = [f"{outcome} {', '.join(filter(None, on))}".strip() for outcome, on in cell.items()]
                parts.append(f"| {what} | {'<br>'.join(outcomes)} |\n")
        return "".join(parts)


def _filled(text: str, parameters: Mapping[str, Any]) -> str:
    for name, value in parameters.items():
        text = text.replace(f"{{{name}}}", str(value).removeprefix("torch."))
    return text


def _outcome(report: pytest.TestReport, marker: pytest.Mark) -> str:
    if report.skipped:
        assert isinstance(report.longrepr, tuple)
        return f"not tried ({report.longrepr[2].removeprefix('Skipped: ')}):"
    if report.failed:
        return "✗"
    if "outcome" in (said := dict(report.user_properties)):
        return str(said["outcome"])
    return "refused:" if marker.kwargs.get("refused") else "✓"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the page instead of writing it")
    check = parser.parse_args().check
    table = SupportTable()
    pytest.main(["-q", "-p", "no:cacheprovider", "-m", "supports", *FOLDERS], plugins=[table])
    if table.failed or not table.sections:
        print("Some tests failed: nothing written.", file=sys.stderr)
        return 1
    if check:
        same = PAGE.exists() and PAGE.read_text() == table.page()
        print(f"{PAGE} is {'up to date' if same else 'out of date: run python -m tests.support_table'}.")
        return 0 if same else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(table.page())
    print(f"Wrote {PAGE}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
