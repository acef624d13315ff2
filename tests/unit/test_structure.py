"""Who may import what, and how long things may grow: the design's rules, read from the sources.

Each rule is a function from a file's path (relative to the repository) and its text to a list of
"line: fault". It is tried on small texts that break it, then on every file of the project.
"""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 70
Rule = Callable[[str, str], list[str]]

# ---- reading a source


@functools.cache
def parse(text: str) -> ast.Module:
    """Every rule reads every file: each is parsed once."""
    return ast.parse(text)


def imported_names(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) of all imports; `from a import b` gives both a and a.b."""
    package = path.removesuffix(".py").removesuffix("/__init__").split("/")
    if not path.endswith("__init__.py"):
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func) in DYNAMIC_IMPORTS and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


DYNAMIC_IMPORTS = {"__import__", "import_module", "importlib.import_module"}


def dotted(node: ast.AST) -> str:
    """Returns "a.b.c" for the expression a.b.c, and "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return f"{left}.{node.attr}" if left else ""
    return ""


def attribute_chains(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (chain := dotted(node)):
            yield node.lineno, chain


def is_within(name: str, module: str) -> bool:
    """Whether a dotted name is a module or something in it."""
    return name == module or name.startswith(f"{module}.")


def top_level(name: str) -> str:
    return name.partition(".")[0]


# ---- rules


def importers_of(*modules: str, only_in: tuple[str, ...]) -> Rule:
    """Makes the rule that only files under `only_in` may import (or reach into) the modules."""

    def rule(path: str, text: str) -> list[str]:
        if path.startswith(only_in):
            return []
        tree = parse(text)
        used = {*imported_names(path, tree), *attribute_chains(tree)}
        return [
            f"{line}: uses {module}, which belongs in {' and '.join(only_in)}"
            for module in modules
            for line in sorted({line for line, name in used if is_within(name, module)})
        ]

    return rule


def nvfp4_knows_tensors_only(path: str, text: str) -> list[str]:
    if not path.startswith("pipeline/nvfp4/"):
        return []
    faults = []
    for line, name in imported_names(path, parse(text)):
        ours = is_within(name, "pipeline.nvfp4") or is_within(name, "pipeline.errors")
        if not (ours or top_level(name) in {"torch", "triton", *sys.stdlib_module_names}):
            faults.append(f"{line}: pipeline/nvfp4 imports {name}")
    return faults


def no_print(path: str, text: str) -> list[str]:
    return [
        f"{node.lineno}: print; use logging or a rich console"
        for node in ast.walk(parse(text))
        if isinstance(node, ast.Call) and dotted(node.func) in {"print", "builtins.print"}
    ]


def no_patching(path: str, text: str) -> list[str]:
    """Assigning to, or deleting, an attribute of something imported from a third party.

    torch.backends.* are settings, made by assignment: pipeline/runtime may make them.
    """
    if path.startswith("pipeline/mcore/"):
        return []
    tree = parse(text)
    foreign = third_party_bindings(tree)
    faults = []
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            targets = [node]
        elif isinstance(node, ast.Call) and dotted(node.func) in {"setattr", "delattr"}:
            targets = node.args[:1]
        faults += [
            f"{target.lineno}: patches {dotted(target)} outside pipeline/mcore"
            for target in targets
            if top_level(dotted(target)) in foreign
            and not (path.startswith("pipeline/runtime/") and is_setting(dotted(target)))
        ]
    return faults


def is_setting(name: str) -> bool:
    return is_within(name, "torch.backends")


def third_party_bindings(tree: ast.AST) -> set[str]:
    """The names that a file's imports bind to third-party modules or what is in them."""
    origins: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            origins |= {alias.asname or top_level(alias.name): alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            origins |= {alias.asname or alias.name: node.module for alias in node.names}
    own = {"pipeline", "launch", "conf", *sys.stdlib_module_names}
    return {name for name, origin in origins.items() if top_level(origin) not in own}


def opens_with_docstring(path: str, text: str) -> list[str]:
    if ast.get_docstring(parse(text)):
        return []
    return ["1: no docstring that says what the file is for"]


def lengths(path: str, text: str) -> list[str]:
    lines = text.count("\n")
    faults = [f"1: {lines} lines, more than {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []
    for node in ast.walk(parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                faults.append(f"{node.lineno}: {node.name} is {length} lines long")
    return faults


# The brackets keep these patterns from finding themselves.
FORBIDDEN_WORDS = re.compile(r"\b(?:T[O]DO|FI[X]ME|X[X]X)\b|(?i:p[l]aceholder)")
MACHINE_PATHS = re.compile(r"(?<![\w.~$}-])/(?:root|work|home)/\w")
DATA_FILES = {"tokenizer.json", "vocab.json", "merges.txt"}  # words learnt from text


def no_leftovers(path: str, text: str) -> list[str]:
    """Unfinished work, and paths of one person's machine."""
    patterns = [MACHINE_PATHS, *([] if Path(path).name in DATA_FILES else [FORBIDDEN_WORDS])]
    return [
        f"{number}: {match.group()!r}"
        for number, line in enumerate(text.splitlines(), 1)
        for pattern in patterns
        for match in pattern.finditer(line)
    ]


KERNELS = (
    "pipeline/nvfp4/",
    "pipeline/mcore/kernels/",
    "pipeline/checkpoint/random_values.py",
)
SOURCE_RULES: dict[str, Rule] = {
    "megatron only in pipeline/mcore": importers_of("megatron", only_in=("pipeline/mcore/",)),
    "torch.distributed only in pipeline/runtime and pipeline/mcore": importers_of(
        "torch.distributed", only_in=("pipeline/runtime/", "pipeline/mcore/")
    ),
    "hydra only in pipeline/config.py and launch": importers_of(
        "hydra", "omegaconf", only_in=("pipeline/config.py", "launch/")
    ),
    "triton only where the kernels are": importers_of("triton", only_in=KERNELS),
    "environment only in launch and pipeline/runtime": importers_of(
        *("os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv"),
        only_in=("launch/", "pipeline/runtime/"),
    ),
    "pipeline/nvfp4 knows tensors only": nvfp4_knows_tensors_only,
    "no print": no_print,
    "third-party code is patched only in pipeline/mcore": no_patching,
    "files open with a docstring": opens_with_docstring,
    "lengths": lengths,
}

# ---- every rule can fail

BROKEN = {
    "triton only where the kernels are": [
        ("pipeline/packing.py", "import triton.language as tl"),
        ("pipeline/mcore/moe.py", "from triton import jit"),
    ],
    "megatron only in pipeline/mcore": [
        ("pipeline/sweep.py", "from megatron.core import parallel_state"),
        ("launch/calibrate.py", "import megatron.core as mc"),
        ("pipeline/plan.py", "def f():\n    import megatron"),
        ("pipeline/plan.py", "import importlib\nimportlib.import_module('megatron.core')"),
    ],
    "torch.distributed only in pipeline/runtime and pipeline/mcore": [
        ("pipeline/sweep.py", "import torch.distributed as dist"),
        ("pipeline/sweep.py", "from torch import distributed"),
        ("pipeline/sweep.py", "from torch.distributed import barrier"),
        ("pipeline/calibration/reduce.py", "import torch\ntorch.distributed.barrier()"),
    ],
    "hydra only in pipeline/config.py and launch": [
        ("pipeline/sweep.py", "from omegaconf import OmegaConf"),
        ("pipeline/recipe/load.py", "import hydra.utils"),
    ],
    "environment only in launch and pipeline/runtime": [
        ("pipeline/sweep.py", "import os\nx = os.environ['RANK']"),
        ("pipeline/sweep.py", "import os\nx = os.getenv('RANK')"),
        ("pipeline/sweep.py", "from os import environ"),
    ],
    "pipeline/nvfp4 knows tensors only": [
        ("pipeline/nvfp4/reference.py", "import numpy as np"),
        ("pipeline/nvfp4/reference.py", "from pipeline.sharding import Shard"),
        ("pipeline/nvfp4/reference.py", "from ..sharding import Shard"),
    ],
    "no print": [("pipeline/plan.py", "def f():\n    print('x')")],
    "third-party code is patched only in pipeline/mcore": [
        ("pipeline/sweep.py", "import torch\ntorch.cuda.current_device = lambda: 0"),
        ("launch/plan.py", "from torch import nn\nsetattr(nn.Linear, 'forward', None)"),
        ("pipeline/sweep.py", "import datasets as d\ndel d.Dataset.map"),
        ("pipeline/sweep.py", "import torch\ntorch.backends.cudnn.benchmark = True"),
        ("pipeline/sweep.py", "from rich.console import Console\nConsole.width += 1"),
    ],
    "files open with a docstring": [("pipeline/plan.py", "import math")],
    "lengths": [
        ("pipeline/plan.py", "x = 1\n" * 351),
        ("pipeline/plan.py", "def f():\n" + "    x = 1\n" * 70),
    ],
}

ALLOWED = {
    "triton only where the kernels are": ("pipeline/mcore/kernels/norm.py", "import triton"),
    "megatron only in pipeline/mcore": ("pipeline/mcore/slots.py", "import megatron.core"),
    "torch.distributed only in pipeline/runtime and pipeline/mcore": (
        "pipeline/runtime/collectives.py",
        "import torch.distributed as dist",
    ),
    "hydra only in pipeline/config.py and launch": ("launch/plan.py", "import hydra"),
    "environment only in launch and pipeline/runtime": (
        "launch/plan.py",
        "import os\nx = os.environ['RANK']",
    ),
    "pipeline/nvfp4 knows tensors only": (
        "pipeline/nvfp4/reference.py",
        "import math\nimport torch.nn\nfrom pipeline.errors import X\nfrom .formats import Y",
    ),
    "no print": ("pipeline/plan.py", "console.print('x')"),
    "third-party code is patched only in pipeline/mcore": (
        "pipeline/sweep.py",
        "import torch\nx = torch.nn.Linear(1, 1)\nx.weight = None\nself.y = torch.ones(1)",
    ),
    "files open with a docstring": ("pipeline/plan.py", '"""Plans."""'),
    "lengths": ("pipeline/plan.py", "def f():\n" + "    x = 1\n" * 69 + "x = 1\n" * 280),
}


@pytest.mark.parametrize("name", SOURCE_RULES)
def test_rule_finds_what_breaks_it_and_only_that(name: str) -> None:
    for path, text in BROKEN[name]:
        assert SOURCE_RULES[name](path, text), f"{name}: not found in {text!r}"
    assert SOURCE_RULES[name](*ALLOWED[name]) == []


@pytest.mark.parametrize(
    "text",
    ["# TO" + "DO: later", "FIX" + "ME", "a place" + "holder", "cd /ro" + "ot/x", "'/wo" + "rk/a'"],
)
def test_leftovers_are_found(text: str) -> None:
    assert no_leftovers("README.md", f"fine\n{text}\n")


def test_harmless_words_and_paths_are_not_leftovers() -> None:
    text = "model-XXXXX-of-YYYYY ~/work/a https://host.org/work/b $HOME/root/x /workspace/c"
    assert no_leftovers("README.md", text) == []


# ---- the project keeps them


def tracked_files() -> list[str]:
    """Files that git tracks or would track; empty outside a git checkout."""
    listing = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    names = listing.stdout.split("\0") if listing.returncode == 0 else []
    return [name for name in names if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("name", SOURCE_RULES)
def test_sources_keep_the_rule(name: str) -> None:
    paths = [path for folder in ("pipeline", "launch") for path in (ROOT / folder).rglob("*.py")]
    assert paths
    faults = []
    for path in sorted(paths):
        relative = path.relative_to(ROOT).as_posix()
        found = SOURCE_RULES[name](relative, path.read_text(encoding="utf-8"))
        faults += [f"{relative}:{fault}" for fault in found]
    assert faults == [], "\n".join([name, *faults])


def test_no_leftovers_in_any_text_file() -> None:
    names = tracked_files()
    if not names:
        pytest.skip("not a git checkout")
    faults = []
    for name in names:
        content = (ROOT / name).read_bytes()
        if b"\0" not in content[:8192]:
            text = content.decode("utf-8", errors="replace")
            faults += [f"{name}:{fault}" for fault in no_leftovers(name, text)]
    assert faults == [], "\n".join(faults)
