"""MkDocs hooks: pages whose text is a file in the root of the repository, and tables of measurements."""

from pathlib import Path
from typing import Any

from results import filled

ROOT = Path(__file__).resolve().parent.parent
INCLUDED = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Replace the stub of an included page by its file, with links relative to docs/; fill in the tables."""
    name = INCLUDED.get(page.file.src_uri)
    return (ROOT / name).read_text().replace("](docs/", "](") if name else filled(markdown)
