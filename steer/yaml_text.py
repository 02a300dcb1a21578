"""Strict YAML: the scalars of YAML 1.2, no repeated keys, no aliases."""

import re
from typing import Any

import yaml

from steer.errors import InputError

# PyYAML follows YAML 1.1: 1e-5 is a string, `no` is false, 010 is eight, 1:30 is ninety.
SCALARS = {
    "null": (r"~|null|", ["~", "n", ""]),
    "bool": (r"true|false", ["t", "f"]),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?([0-9]+\.[0-9]*([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)|\.nan",
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own name

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # a few lines of aliases can expand to gigabytes
            raise _problem("aliases (*name) are not supported: write out the values", self.peek_event())
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise _problem("a key must be text: put it in quotes", key)
            if key.value in keys:
                raise _problem(f"{key.value!r} is repeated: keep one", key)
            keys.add(key.value)
        return super().construct_mapping(node, deep)


for _name, (_pattern, _first) in SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)


def _problem(message: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=message, problem_mark=place.start_mark)


def read_yaml(text: str, where: str) -> Any:
    """Parse a YAML text. Raises InputError that begins with `where` and, for several lines, names the line."""
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark and "\n" in text else ""
        raise InputError(f"{where}{line}: {error.problem or 'not YAML'}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: not YAML ({' '.join(str(error).split())[:100]})") from error
