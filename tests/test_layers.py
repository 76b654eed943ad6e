"""Imports go down only, and TRL's private names stay in one module. Read off the source: nothing is imported."""

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "rlhf_bayes"

# layer of each part of the package; a part imports parts of its own layer and of those below
LAYERS = {
    "notebook": 0,
    "numerics": 0,
    "lm": 1,
    "rewards": 2,
    "likelihoods": 2,
    "posterior": 2,
    "testing": 2.5,
    "objectives": 3,
    "samplers": 3,
    "diagnostics": 3,
    "store": 3,
    "trainers": 4,
    "report": 4,
    "toy": 4,
    "": 4.5,  # rlhf_bayes/__init__.py names what users import from everywhere
    "commands": 5,
    "cli": 5,  # the old place of commands/flags
    "__main__": 5,
}
FIRST_LAYER_WITH_TRL = 4

# (importing module, imported part): reason. Only inside a function or under TYPE_CHECKING.
UPWARD = {
    (
        "rlhf_bayes.lm.language_model",
        "posterior",
    ): "`tilt`, `condition`, `constrain` start from the prior, as a user does",
    ("rlhf_bayes.posterior", "samplers"): "`sample` starts from the posterior, as a user does",
}

TRL_CONTACT = "rlhf_bayes.trainers._trl"


class Import(NamedTuple):
    module: str  # who imports
    target: str  # absolute name of the module imported
    names: tuple[str, ...]  # the names taken from it
    at_import_time: bool
    line: int

    def __str__(self) -> str:
        return f"{self.module}, line {self.line}, imports {self.target} ({', '.join(self.names) or 'whole'})"


def module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.Module, module: str, is_package: bool) -> list[Import]:
    found = []

    def visit(node: ast.AST, at_import_time: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(module, alias.name, (), at_import_time, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            base = base[: len(base) - node.level + is_package] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            names = tuple(alias.name for alias in node.names)
            found.append(Import(module, target, names, at_import_time, node.lineno))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            named = [str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)]
            found.extend(Import(module, name, (), False, node.lineno) for name in named[:1])
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            deferred = True
        for child in ast.iter_child_nodes(node):
            visit(child, at_import_time and not deferred)

    visit(tree, True)
    return found


def package_trees(package: Path) -> dict[str, tuple[ast.Module, bool]]:
    return {
        module_name(path, package): (ast.parse(path.read_text(encoding="utf-8")), path.name == "__init__.py")
        for path in sorted(package.rglob("*.py"))
    }


def package_imports(package: Path) -> list[Import]:
    return [
        imported
        for module, (tree, is_package) in package_trees(package).items()
        for imported in imports_of(tree, module, is_package)
    ]


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported_parts(imported: Import) -> set[str]:
    """The parts of the package that an import reaches: `from rlhf_bayes import lm` reaches lm."""
    if imported.target.split(".")[0] != "rlhf_bayes":
        return set()
    if imported.target == "rlhf_bayes":
        return {name if name in LAYERS else "" for name in imported.names} or {""}
    return {part_of(imported.target)}


def upward_imports(imports: list[Import]) -> list[str]:
    violations = []
    for imported in imports:
        for part in imported_parts(imported):
            if LAYERS[part] <= LAYERS[part_of(imported.module)]:
                continue
            if not imported.at_import_time and (imported.module, part) in UPWARD:
                continue
            violations.append(str(imported))
    return violations


def in_contact(module: str) -> bool:
    return f"{module}.".startswith(f"{TRL_CONTACT}.")


def is_trl(imported: Import) -> bool:
    return imported.target.split(".")[0] == "trl"


def private_trl_imports(imports: list[Import]) -> list[str]:
    """Anything but `from trl import Public`."""
    return [
        str(imported)
        for imported in imports
        if is_trl(imported)
        and not in_contact(imported.module)
        and (imported.target != "trl" or any(name.startswith("_") for name in imported.names))
    ]


def trl_trainer_private_names() -> set[str]:
    """Underscored methods and attributes that TRL's own classes under `RLOOTrainer` and `RewardTrainer` define."""
    trainer_folder = Path(find_spec("trl").submodule_search_locations[0]) / "trainer"
    names = set()
    for file in ("rloo_trainer.py", "reward_trainer.py", "base_trainer.py", "_base_trainer.py"):
        if not (trainer_folder / file).is_file():
            continue
        for node in ast.walk(ast.parse((trainer_folder / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names |= {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            if (
                isinstance(node, ast.Attribute)
                and ast.unparse(node.value) == "self"
                and isinstance(node.ctx, ast.Store)
            ):
                names.add(node.attr)
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def private_trl_attributes(tree: ast.Module, module: str, private_names: set[str]) -> list[str]:
    """Uses and overrides of TRL's private names on a trainer: `self._x`, `trainer._x`, `super()._x`, `def _x`."""
    violations = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in private_names:
            violations.append(f"{module}, line {node.lineno}, uses {ast.unparse(node)}")
        if isinstance(node, ast.ClassDef):
            violations += [
                f"{module}, line {item.lineno}, overrides {item.name}"
                for item in node.body
                if isinstance(item, ast.FunctionDef) and item.name in private_names
            ]
    return violations


def test_every_part_has_a_layer():
    parts = {part_of(module) for module in package_trees(PACKAGE)}
    assert parts >= {"", "numerics", "lm", "trainers"}
    assert not parts - LAYERS.keys(), "give the new part a layer in LAYERS, as in the design"


def test_imports_go_down_only():
    assert upward_imports(package_imports(PACKAGE)) == []


def test_objectives_know_no_host():
    """Another host needs glue, not mathematics: objectives see tensors, and the world through a small protocol."""
    hosts = {"trl", "accelerate", "transformers", "peft", "deepspeed", "datasets"}
    violations = [
        str(imported)
        for imported in package_imports(PACKAGE)
        if part_of(imported.module) == "objectives" and imported.target.split(".")[0] in hosts
    ]
    assert violations == []


def test_every_file_has_a_name_of_its_own():
    names = [path.name for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_upward_exceptions_are_still_used():
    imports = package_imports(PACKAGE)
    used = {(imported.module, part) for imported in imports for part in imported_parts(imported)}
    assert UPWARD.keys() - used == set(), "remove the exception from UPWARD"


def test_nothing_below_the_trainers_imports_trl():
    violations = [
        str(imported)
        for imported in package_imports(PACKAGE)
        if is_trl(imported) and LAYERS[part_of(imported.module)] < FIRST_LAYER_WITH_TRL
    ]
    assert violations == []


def test_numerics_is_pure():
    allowed = {"math", "typing", "collections", "dataclasses", "torch", "numpy", "scipy", "rlhf_bayes"}
    numerics = [imported for imported in package_imports(PACKAGE) if part_of(imported.module) == "numerics"]
    assert {imported.target.split(".")[0] for imported in numerics} <= allowed


def test_one_module_imports_trl_internals():
    assert private_trl_imports(package_imports(PACKAGE)) == []


def test_one_module_touches_the_private_names_of_trl_trainers():
    private_names = trl_trainer_private_names()
    assert {"_compute_loss", "_calculate_rewards", "_metrics"} <= private_names
    violations = [
        violation
        for module, (tree, _) in package_trees(PACKAGE).items()
        if part_of(module) == "trainers" and not in_contact(module)
        for violation in private_trl_attributes(tree, module, private_names)
    ]
    assert violations == []


@pytest.mark.parametrize(
    ("path", "source", "upward", "trl_below", "private"),
    [
        ("numerics/kl.py", "from ..lm import LanguageModel", True, False, False),
        ("numerics/kl.py", "from .. import lm", True, False, False),
        ("numerics/kl.py", "import rlhf_bayes.lm.head", True, False, False),
        ("numerics/kl.py", "import rlhf_bayes", True, False, False),
        ("numerics/__init__.py", "from .kl import k1", False, False, False),
        ("lm/head.py", "def f():\n    from ..trainers import PPOTrainer", True, False, False),
        ("lm/head.py", "def f():\n    from rlhf_bayes.posterior import tilt", True, False, False),
        ("lm/language_model.py", "from ..posterior import tilt", True, False, False),
        ("lm/language_model.py", "def f():\n    from ..posterior import tilt", False, False, False),
        ("posterior.py", "from .lm import LanguageModel\nfrom . import numerics, likelihoods", False, False, False),
        ("posterior.py", "from .testing import EnumerableLM", True, False, False),
        ("rewards/model.py", "def f():\n    from trl import RLOOConfig", False, True, False),
        ("testing/contract.py", "import trl", False, True, False),
        ("trainers/ppo/ppo_trainer.py", "from trl import RLOOTrainer", False, False, False),
        ("trainers/ppo/ppo_trainer.py", "from trl.trainer.utils import pad", False, False, True),
        ("trainers/ppo/ppo_trainer.py", "import trl.models.utils", False, False, True),
        ("trainers/ppo/ppo_trainer.py", "from trl import _compat", False, False, True),
        ("trainers/_trl/rollout_trainer.py", "from trl.trainer.utils import pad", False, False, False),
        ("objectives/ppo.py", "from rlhf_bayes.trainers import PPOTrainer", True, False, False),
        ("objectives/ppo.py", "from trl import RLOOConfig", False, True, False),
        ("diagnostics/evaluate.py", "import trl", False, True, False),
        ("commands/sample.py", "from rlhf_bayes import PPOTrainer", False, False, False),
        ("toy/train_lm.py", "from rlhf_bayes.trainers import PPOTrainer", False, False, False),
    ],
)
def test_the_rules_see_what_they_should(path, source, upward, trl_below, private, tmp_path):
    file = tmp_path / "rlhf_bayes" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    imports = package_imports(tmp_path / "rlhf_bayes")
    below = [item for item in imports if is_trl(item) and LAYERS[part_of(item.module)] < FIRST_LAYER_WITH_TRL]
    assert imports
    assert bool(upward_imports(imports)) == upward
    assert bool(below) == trl_below
    assert bool(private_trl_imports(imports)) == private


def test_private_attributes_are_seen():
    source = (
        "class T(RolloutTrainer):\n    def _compute_loss(self):\n        return super()._prepare_inputs(self._own)"
    )
    private_names = {"_compute_loss", "_prepare_inputs"}
    assert private_trl_attributes(ast.parse(source), "m", private_names) == [
        "m, line 2, overrides _compute_loss",
        "m, line 3, uses super()._prepare_inputs",
    ]
