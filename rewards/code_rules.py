"""Rules for rewards in Python from an untrusted author: an allow-list of syntax, names, attributes and modules.

These rules refuse typical mistakes and habits of language models; they are not a security boundary. The limits of the
child process that runs the code (`steer.rewards.sandbox_child`) are the second line of defence.
"""

import ast
import builtins
import math
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, ModuleType
from typing import Any

import torch
from torch.nn import functional as F

FUNCTION, PARAMETERS = "reward", ["images", "prompts"]
MAX_LINES = 200
HELPERS = ("luma", "saturation", "colour_mask", "edges", "blur", "clip_cosine")
MODULES: dict[str, ModuleType] = {
    "torch": torch,
    "torch.nn.functional": F,
    "torch.fft": torch.fft,
    "torch.linalg": torch.linalg,
    "torch.special": torch.special,
    "math": math,
}
BUILTINS = frozenset(
    (
        *("abs", "all", "any", "bool", "dict", "divmod", "enumerate", "filter", "float", "frozenset", "int"),
        *("isinstance", "len", "list", "map", "max", "min", "pow", "range", "reversed", "round", "set", "slice"),
        *("sorted", "str", "sum", "tuple", "zip", "True", "False", "None", "ValueError"),
    )
)
# Functions of torch that are written in Python, not operations of its C library.
TORCH_EXTRA = frozenset(
    (
        *("cdist", "einsum", "meshgrid", "norm", "split", "stack", "stft", "tensordot", "unique", "atleast_1d"),
        *("no_grad", "Tensor", "finfo"),
    )
)
TORCH_NAMES = (frozenset(dir(torch._C._VariableFunctions)) - {"from_file"}) | TORCH_EXTRA
DENIED = frozenset(
    (
        *("apply_", "backward", "data_ptr", "format", "format_map", "map2_", "map_", "module_load", "numpy"),
        *("register_hook", "register_post_accumulate_grad_hook", "resize_", "resize_as_", "set_", "share_memory_"),
        *("storage", "storage_type", "untyped_storage", "grad_fn", "volatile"),
    )
)
METHODS = frozenset().union(*map(dir, (torch.Tensor, str, list, dict, tuple, set, torch.finfo))) - DENIED
STATEMENTS = (ast.ClassDef, ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith, ast.Await, ast.Global, ast.Match)


def refusals(code: str) -> list[str]:
    """Return the reasons, one line each, why a file may not run as a reward; [] if it may."""
    lines = code.count("\n") + 1
    if lines > MAX_LINES:
        return [f"the file has {lines} lines: at most {MAX_LINES}"]
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f"line {error.lineno}: " if isinstance(error, SyntaxError) else ""
        return [f"syntax error: {line}{getattr(error, 'msg', error)}"]
    aliases, reasons = dict[str, str](), list[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            given, own = _imported(node)
            reasons += [f"line {node.lineno}: {one}" for one in own]
            aliases |= given
    for node in ast.walk(tree):
        reasons += [f"line {getattr(node, 'lineno', 1)}: {one}" for one in _node_refusals(node, aliases)]
    reasons += _alias_refusals(tree, aliases)
    signatures = [
        [a.arg for a in n.args.args] for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == FUNCTION
    ]
    if signatures != [PARAMETERS]:
        reasons.append(f"the file must define one function {FUNCTION}({', '.join(PARAMETERS)})")
    return list(dict.fromkeys(reasons))


def _imported(node: ast.Import | ast.ImportFrom) -> tuple[Mapping[str, str], list[str]]:
    """Return the modules that an import binds, by their names in the file, and reasons to refuse other modules."""
    aliases: dict[str, str] = {}
    reasons: list[str] = []
    prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) and not node.level else ""
    for one in node.names:
        path = prefix + one.name
        if path not in MODULES or (isinstance(node, ast.ImportFrom) and node.level):
            reasons.append(f"import of {path} is not allowed; modules are {', '.join(MODULES)}")
        elif one.asname or isinstance(node, ast.ImportFrom):
            aliases[one.asname or one.name] = path
        else:  # import torch.fft binds torch
            aliases[path.partition(".")[0]] = path.partition(".")[0]
    return aliases, reasons


def _node_refusals(node: ast.AST, aliases: Mapping[str, str]) -> Iterator[str]:
    """Yield reasons to refuse the syntax, the names and the attributes of a node."""
    if isinstance(node, STATEMENTS):
        yield f"{type(node).__name__} is not allowed: write functions, loops and conditions"
    elif isinstance(node, ast.FunctionDef | ast.Lambda):
        if getattr(node, "decorator_list", []):
            yield "decorators are not allowed"
        args = node.args
        named = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
        yield from (f"{one.arg!r} may not be bound again" for one in named if one.arg in aliases or "__" in one.arg)
        if getattr(node, "name", "") in (*aliases, *HELPERS):
            yield f"{node.name!r} may not be bound again"  # type: ignore[union-attr]
    elif isinstance(node, ast.Name):
        if node.id.startswith("__") or (hasattr(builtins, node.id) and node.id not in BUILTINS):
            yield f"the name {node.id!r} is not allowed"
        if not isinstance(node.ctx, ast.Load) and node.id in (*aliases, *HELPERS):
            yield f"{node.id!r} may not be bound again"
    elif isinstance(node, ast.Attribute):
        chain = _chain(node)
        if chain is None or chain[0] not in aliases:
            if node.attr.startswith("_") or node.attr not in METHODS:
                yield f"the attribute {node.attr!r} is not allowed"
        elif reason := _path_refusal(f"{aliases[chain[0]]}.{'.'.join(chain[1:])}"):
            yield reason


def _alias_refusals(tree: ast.AST, aliases: Mapping[str, str]) -> Iterator[str]:
    """Yield reasons to refuse modules that are used as values: they could be passed on."""
    bases = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in aliases and id(node) not in bases:
            yield f"line {node.lineno}: {node.id!r} is a module: use {node.id}.NAME"


def _chain(node: ast.Attribute) -> list[str] | None:
    """Return the names of NAME.a.b; None for an attribute of any other expression."""
    names = [node.attr]
    value = node.value
    while isinstance(value, ast.Attribute):
        names.append(value.attr)
        value = value.value
    return [value.id, *reversed(names)] if isinstance(value, ast.Name) else None


def _path_refusal(path: str) -> str | None:
    """Return the reason to refuse a dotted path from an allowed module; None if it is allowed."""
    module = max((name for name in MODULES if f"{path}.".startswith(f"{name}.")), key=len)
    rest = path.removeprefix(module).strip(".").split(".")
    if f"{path}." in ("torch.nn.",) or rest == [""]:  # a step of a longer chain, which is checked as a whole
        return None
    name, *methods = rest
    value: Any = getattr(MODULES[module], name, None)
    constant = isinstance(value, torch.dtype | float | int)
    known = name in TORCH_NAMES if module == "torch" else callable(value) and not isinstance(value, type)
    if name.startswith("_") or isinstance(value, ModuleType) or not (known or constant):
        return f"{path} is not allowed"
    if any(one.startswith("_") or one not in METHODS for one in methods):
        return f"{path} is not allowed"
    imported = callable(value) and not str(getattr(value, "__module__", "")).startswith("torch.nn.functional")
    if module == "torch.nn.functional" and imported and not isinstance(value, BuiltinFunctionType):
        return f"{path} is not allowed"
    return None


def compile_reward(code: str, helpers: Mapping[str, Any]) -> Any:
    """Execute an allowed file with restricted builtins and return its function. Raises ValueError with the refusals."""
    if reasons := refusals(code):
        raise ValueError("; ".join(reasons))
    tree = ast.parse(code)
    space: dict[str, Any] = {
        "__builtins__": {name: getattr(builtins, name) for name in BUILTINS if hasattr(builtins, name)},
        **helpers,
    }
    for node in [one for one in ast.walk(tree) if isinstance(one, ast.Import | ast.ImportFrom)]:
        space |= {name: MODULES[path] for name, path in _imported(node)[0].items()}
    exec(compile(_Unimported().visit(tree), "reward.py", "exec"), space)
    return space[FUNCTION]


class _Unimported(ast.NodeTransformer):
    """Transformer that replaces imports by `pass`: the modules are in the namespace already."""

    def visit_Import(self, node: ast.Import) -> ast.AST:
        return ast.copy_location(ast.Pass(), node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        return ast.copy_location(ast.Pass(), node)
