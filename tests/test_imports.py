import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

OUTER_LAYERS = ("flax", "orbax", "sklearn", "tensorflow_datasets", "matplotlib", "rich")


@pytest.fixture(scope="module")
def imported():
    """The modules that `import eupmu_jax` loads into a fresh interpreter."""
    program = "import sys, eupmu_jax; print(*sys.modules)"
    return set(
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    )


@pytest.mark.parametrize("name", OUTER_LAYERS)
def test_the_transforms_need_jax_and_optax_alone(imported, name):
    assert "eupmu_jax.surgery.explicit" in imported
    assert name not in imported


def layers():
    """The rank of each folder and module of the package, from the table of CONTRIBUTING.md."""
    found, rank, layer = {}, 0, ""
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and "`" in cells[1]:
            layer = cells[0] or layer
            # Transforms, losses and numbers have one rank each; in the layer of runs every row has its own.
            rank += bool(cells[0]) or layer == "runs"
            found |= {name.rstrip("/").removesuffix(".py"): rank for name in re.findall(r"`([\w./]+)`", cells[1])}
    return found


def imports():
    """Yields `(file, its folder or module, a folder or module of the package that it imports)`."""
    package = ROOT / "eupmu_jax"
    for path in sorted(package.rglob("*.py")):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "eupmu_jax":
                parts = node.module.split(".")
                names = parts[1:2] or [alias.name for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("eupmu_jax.")]
            else:
                continue
            yield from ((path, own, name) for name in names)


def test_a_layer_imports_only_from_its_own_rank_and_those_above_it_in_the_table():
    ranks, seen = layers(), set()
    for path, own, name in imports():
        if own in ("__init__", "__main__"):
            continue
        assert ranks[name] <= ranks[own], f"{path} imports {name}"
        seen |= {own, name}
    assert set(ranks) == seen | {"objectives"}


def test_every_public_name_exists():
    import eupmu_jax

    assert [name for name in eupmu_jax.__all__ if not hasattr(eupmu_jax, name)] == []


# What users' programs may import. Removing a name from this table needs an entry in the changelog.
PUBLIC = {
    "eupmu_jax": (
        "AccumulateState BestFeasible BestFeasibleState FurthestFeasible ImplicitSurgeryState Level ScaleByGenState "
        "Task TwoPass TwoPassState UnilateralSurgeryState Unlearned UtilityGuardState accumulate aggregators "
        "best_feasible controllers eupmu explicit_step freeze furthest_feasible implicit_step implicit_surgery "
        "multipliers objectives reference_surgery retain_losses scalarized_value_and_grad scale_by_gen sharding "
        "shared_forward skip_nonfinite stack_objectives stacked_value_and_grad tasks tolerances two_pass "
        "unilateral_surgery unlearn unseen_level unseen_levels utility_guard "
    ),
    "eupmu_jax.aggregators": (
        "FamoMemory LossWeightingState OmdTchMemory OwaState WeightingState aligned_mtl cagrad chebyshev config "
        "dualproj famo gdr_gma imtl_g mean mgda nash_mtl ngdiff omd_tch owa pcgrad upgrad "
    ),
    "eupmu_jax.controllers": (
        "AugmentedLagrangianState NuPIState QuadraticPenaltyState ScaleByLimitState SteeringState "
        "augmented_lagrangian forget_level nu_pi quadratic_penalty retain_limit scale_by_limit "
    ),
    "eupmu_jax.objectives": "bounded_ascent cross_entropy gradient_ascent kl_to_teacher kl_to_uniform random_labels",
    "eupmu_jax.sharding": "batch_shardings gram_matrix make_mesh param_shardings stacked_shardings state_shardings",
    "eupmu_jax.tolerances": "Tolerance budget constant relative schedule stateless",
    "eupmu_jax.tasks": "Examples Task as_examples classification language",
    "eupmu_jax.methods": "METHODS Choice Cost LogUniform Method Procedure Settings Terms loss_of method",
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in PUBLIC for name in PUBLIC[module].split()])
def test_public_names_stay_importable(module, name):
    assert getattr(importlib.import_module(module), name) is not None
