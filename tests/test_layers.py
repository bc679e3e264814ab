"""Imports go strictly downward: what a module may know is decided by its layer."""

import ast
from pathlib import Path

import d2f_jax

ROOT = Path(d2f_jax.__file__).parent
LAYERS = [
    {"errors"},
    {"schedule", "flow", "alignment", "sampling", "adaptive", "sde", "sampler", "likelihood"},
    {"models", "lora", "task"},
    {"chips", "distributed", "flops", "hlo", "objectives", "optim", "sharding", "step", "traffic", "validation"},
    {"checkpoint", "data", "lora_files", "lora_foreign", "metrics", "oracle", "report", "torch_files", "weights"},
    {"ensemble", "export", "pipeline", "programs", "resizing"},
    {"comparison", "convert", "datasets", "evaluate", "measures", "prepare", "prior", "program", "reflow", "sample"}
    | {"blueprint", "forecast", "plan", "settings", "subjects", "train", "watch"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def part(file: Path) -> str:
    """The name by which a file is listed: its top folder, or itself without suffix."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_parts(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            # `from d2f_jax import flow` names a module, `from d2f_jax.flow import f` a member.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("d2f_jax.")}
    return found


MODULES = [file for file in ROOT.rglob("*.py") if file.name != "__init__.py" or file.parent != ROOT]


def test_every_module_has_a_layer() -> None:
    assert {part(file) for file in MODULES} == set(LEVEL)


def test_imports_go_downward() -> None:
    upward = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in MODULES
        for name in imported_parts(file)
        if name != part(file) and LEVEL[name] > LEVEL[part(file)]
    ]
    assert not upward


def test_only_programs_and_configs_know_configs_and_define_flags() -> None:
    below = [file for file in MODULES if LEVEL[part(file)] < len(LAYERS) - 1]
    assert len(below) > 20
    for word in ("ml_collections", "flags.DEFINE"):
        assert not [str(file) for file in below if word in file.read_text()]


def test_core_needs_neither_torch_nor_tensorflow() -> None:
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not {"torch", "tensorflow", "diffusers"} & set(ast.unparse(node).replace(".", " ").split())
