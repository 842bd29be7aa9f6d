"""The pages that show code for a GPU."""

from __future__ import annotations

import pages
import pytest


@pytest.mark.parametrize("page", ["batch", "start"])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = pages.blocks(pages.ROOT / "docs" / f"{page}.md")
    assert any("cuda" in block.code for block in blocks) and not [block for block in blocks if block.missing]
    pages.run(blocks, pages.given())
