"""MkDocs hooks: pages of the site whose text is a file in the root of the repository."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INCLUDED = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Replace the stub of an included page by its file, with links relative to docs/."""
    name = INCLUDED.get(page.file.src_uri)
    return (ROOT / name).read_text().replace("](docs/", "](") if name else markdown
