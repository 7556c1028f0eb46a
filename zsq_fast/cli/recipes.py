"""zsq-fast recipes: the methods that `quantize --recipe` knows."""

from __future__ import annotations

import json
from collections.abc import Sequence

from zsq_fast.cli.arguments import Parser


def run(words: Sequence[str]) -> int:
    parser = Parser("recipes", "List the recipes: name and title.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse(words)
    from zsq_fast.methods import available_recipes

    recipes = available_recipes()
    if arguments.json:
        print(json.dumps(recipes, indent=1))
    else:
        width = max(map(len, recipes))
        print("\n".join(f"{name:<{width}}  {title}" for name, title in recipes.items()))
    return 0
