"""docs/recipes.md and the table in README.md are what bench/recipe_table.py writes."""

import importlib.util
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]


def test_the_tables_are_current() -> None:
    path = REPOSITORY / "bench" / "recipe_table.py"
    spec = importlib.util.spec_from_file_location("recipe_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tables = module.sections()
    written = (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert written == module.document(tables)
    assert (REPOSITORY / "README.md").read_text(encoding="utf-8") == module.readme(tables)
