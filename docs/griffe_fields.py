"""A griffe extension: aligned lists of fields in docstrings become Markdown lists, examples become code.

    num_particles   K, in place of num_images_per_prompt
                    (continued lines are indented to the same column)

`make docs` loads it; the package does not.
"""

import re
from typing import Any

import griffe

FIELD = re.compile(r"^(?P<names>[a-z_][\w, *]*?)\s{2,}(?P<text>\S.*)$")
EXAMPLE = re.compile(r"^[a-z_]+ = .*[()]")


def examples_to_code(docstring: str) -> str:
    """Fence each paragraph that begins with an assignment of a call."""
    paragraphs = docstring.split("\n\n")
    return "\n\n".join(f"```python\n{text}\n```" if EXAMPLE.match(text) else text for text in paragraphs)


def fields_to_list(docstring: str) -> str:
    """Rewrite each `name  text` line, with its continued lines, as one item of a Markdown list."""
    lines: list[str] = []
    in_list = False
    for line in docstring.splitlines():
        if match := FIELD.match(line):
            names = ", ".join(f"`{name.strip()}`" for name in match["names"].split(","))
            lines += [*([] if in_list else [""]), f"- {names}: {match['text']}"]
            in_list = True
        elif in_list and line.startswith("    "):
            lines[-1] += " " + line.strip()
        else:
            lines += ["", line] if in_list else [line]
            in_list = False
    return "\n".join(lines)


class FieldLists(griffe.Extension):
    """Apply both rewritings to every docstring that griffe reads."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = fields_to_list(examples_to_code(obj.docstring.value))

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Export the names that `steer` imports for type checkers, from which it computes its `__all__`."""
        pkg.exports = [name for name, path in pkg.imports.items() if path.startswith("steer.")]
