"""Makes the packs of this folder again: ``python -m packs.train [ID ...] [--device cuda]``.

For each: its text, `modularbase train fit`, `modularbase pack build`, the archive into this folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from modularbase.packs.build import build
from modularbase.packs.project import (
    CONFIG_FILE,
    MANIFEST_FILE,
    WEIGHTS_FOLDER,
    archive_path,
    read_manifest,
)
from packs.recipes import RECIPES
from packs.texts import ROOT, TEXTS, make

PROJECTS = tuple(name for name in RECIPES if (ROOT / name / MANIFEST_FILE).exists())
NEUTRAL = "neutral"
EVAL_EVERY = 25
EXACT = Path(".cache/packs")
"""Where packs with F16 experts go, to be compared with the rounded ones."""

_COMMAND = "from modularbase.cli.main import main; main()"


def train(name: str, device: str) -> None:
    """Trains and builds one pack, from the folder of the repository.

    Raises:
        TextError: A text cannot be had.
        subprocess.CalledProcessError: A command failed, and has said why.
    """
    fit(name, device)
    publish(name)


def fit(name: str, device: str) -> None:
    """Trains one pack: its weights go to its project."""
    for text in (name, NEUTRAL):
        if not (TEXTS / text / "facts.json").exists():
            make(text)
    command = ["train", "fit", f"packs/{name}", "--data", f"{TEXTS}/{name}/train.jsonl"]
    command += ["--heldout", f"{TEXTS}/{name}/heldout.jsonl"]
    command += ["--neutral", f"{TEXTS}/{NEUTRAL}/train.jsonl"]
    command += ["--data-licence", RECIPES[name].licence]
    _run([*command, "--eval-every", str(EVAL_EVERY), "--device", device])


def publish(name: str) -> None:
    """Builds one pack of its project's weights, and puts the archive into this folder."""
    project = Path("packs") / name
    _run(["pack", "build", str(project)])
    archive = archive_path(project, read_manifest(project))
    shutil.copyfile(archive, ROOT / archive.name)
    write_exact(project)


def write_exact(project: Path) -> Path:
    """Builds a project's weights with F16 experts; returns the pack file."""
    target = EXACT / f"{project.name}.f16.gguf"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        twin = Path(name) / project.name
        twin.mkdir()
        for file in (CONFIG_FILE, "README.md"):
            shutil.copyfile(project / file, twin / file)
        manifest = json.loads((project / MANIFEST_FILE).read_text(encoding="utf-8"))
        manifest["quantisation"] |= {"experts": "f16", "kl": None}
        (twin / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")
        (twin / WEIGHTS_FOLDER).symlink_to((project / WEIGHTS_FOLDER).resolve())
        found = build(twin).gguf
        assert found is not None  # a project is built into both
        shutil.copyfile(found, target)
    return target


def _run(arguments: Sequence[str]) -> None:
    place = ROOT.parent
    command = [sys.executable, "-c", _COMMAND, *arguments]
    subprocess.run(command, cwd=place, check=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m packs.train", description=__doc__)
    names = ", ".join(PROJECTS)
    parser.add_argument("ids", nargs="*", metavar="ID", help=f"of: {names}; default all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, default cpu")
    chosen = parser.parse_args(arguments)
    unknown = sorted(set(chosen.ids) - set(PROJECTS))
    if unknown:
        parser.error(f"ID: expected names of {names}, found {', '.join(unknown)}")
    for name in chosen.ids or PROJECTS:
        train(name, chosen.device)
    _run(["pack", "index", "packs"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
