"""The code of README and docs runs as it stands, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/*.md")]
]


def run_the_snippet(code: str) -> tuple[list[int], list[int], str]:
    names: dict[str, Any] = {
        "print": lambda text: names.update(printed=str(text)),
    }
    exec(code, names)
    return list(names["out"].shape), list(names["scores"].shape), names["printed"]


def test_the_snippet(rank_pools: Any) -> None:
    text = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code
    joined = 'dist.init_process_group("gloo")'  # the pool's ranks have joined already
    assert joined in code[1]
    for out, scores, printed in rank_pools(2).run(run_the_snippet, code[1].replace(joined, "pass")):
        assert out == [32, 512, 64] and scores == [32, 3, 64]
        assert "plain, over positions" in printed and "owner" in printed


def test_the_decoder_of_long_sequences() -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/long_sequences.md").read_text(), re.DOTALL)
    assert code
    printed: list[Any] = []
    exec(code[1], {"print": printed.append})
    assert printed == [(3000, 8192)]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_exist(page: str) -> None:
    named = re.findall(r"(?<![\w/.])((?:examples|tests|docs|csrc)/[\w./-]+)", (ROOT / page).read_text())
    gone = [path for path in named if not (ROOT / path.rstrip("./")).exists()]
    assert not gone, gone
