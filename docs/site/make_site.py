"""Build the site: pages of docs/ with their links to other files made local, and the generated reference.

python docs/site/make_site.py [--serve]    into build/site; stops at a broken link or an unknown name
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import recipe_keys

ROOT = Path(__file__).resolve().parents[2]
DOCS, PAGES = ROOT / "docs", ROOT / "build" / "docs"
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash", ".sbatch": "bash", ".jsonl": "json"}


class Pages:
    """Files of the repository as pages. What a page links to outside docs/ becomes a page too, below files/."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.written: dict[Path, Path] = {}

    def add(self, source: Path) -> Path:
        """Write the page of a file or folder once; returns its path."""
        if source in self.written:
            return self.written[source]
        inside = source.is_relative_to(DOCS)
        if inside:
            target = self.out / source.relative_to(DOCS)
        else:  # hidden files would not be rendered
            target = Path(self.out, "files", *(part.lstrip(".") for part in source.relative_to(ROOT).parts))
        if source.is_dir():
            target = target / "index.md"
        elif not inside and source.suffix not in (".md", ".png", ".svg"):
            target = target.with_name(target.name + ".md")
        self.written[source] = target
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_file() and target.suffix != ".md":
            shutil.copyfile(source, target)
        else:
            target.write_text(self._text(source, target), encoding="utf-8")
        return target

    def _text(self, source: Path, target: Path) -> str:
        name = source.relative_to(ROOT)
        if source.is_dir():
            shown = sorted(path for path in source.rglob("*") if path.suffix in (".md", ".yaml"))
            lines = [
                f"- [{path.relative_to(source)}]({os.path.relpath(self.add(path), target.parent)})" for path in shown
            ]
            lines = lines or [f"- `{path.relative_to(source)}`" for path in sorted(source.rglob("*.py"))]
            return "\n".join([f"# {name}", "", *lines]) + "\n"
        text = source.read_text(encoding="utf-8")
        if source.suffix != ".md":
            return f"# {name}\n\n````{LANGUAGES.get(source.suffix, 'text')}\n{text}````\n"
        for marker, generate in GENERATED.items():
            if marker in text:
                text = text.replace(marker, generate())
        return LINK.sub(lambda match: match[1] + self._link(match[2], source, target) + match[3], text)

    def _link(self, link: str, source: Path, target: Path) -> str:
        if re.match(r"[a-z]+:", link):
            return link
        to = (source.parent / link).resolve()
        if not to.exists() or not to.is_relative_to(ROOT):
            raise SystemExit(f"{source.relative_to(ROOT)}: the link {link} leads nowhere")
        return os.path.relpath(self.add(to), target.parent)


def assemble(out: Path) -> list[Path]:
    """Write all pages below `out`, which is emptied first; returns their paths."""
    shutil.rmtree(out, ignore_errors=True)
    pages = Pages(out)
    for source in sorted(DOCS.rglob("*")):
        if source.suffix in (".md", ".svg", ".png", ".json", ".css"):
            pages.add(source)
    return list(pages.written.values())


def exported(package: str) -> list[tuple[str, str]]:
    """The public names of a package below kernels/ and the modules that define them, read without importing it."""
    folder = ROOT / "kernels" / Path(*package.split("."))
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    at = {
        alias.asname or alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return [(name, at.get(name, package)) for name in ast.literal_eval(node.value)]
    return []


def kernels() -> str:
    """One mkdocstrings block for each public function of l2v_kernels, then for the parts that single ops export."""
    first = exported("l2v_kernels")
    blocks = [_block(f"{module}.{name}", f"l2v_kernels.{name}") for name, module in first]
    blocks += ["## Parts of single ops", ""]
    shown = {name for name, _ in first}
    for folder in sorted((ROOT / "kernels" / "l2v_kernels").iterdir()):
        package = f"l2v_kernels.{folder.name}"
        if (folder / "__init__.py").is_file() and folder.name != "integrations":
            blocks += [
                _block(f"{at}.{name}", f"{package}.{name}", 3)
                for name, at in exported(package)
                if name not in shown and not name.isupper()
            ]
    blocks += ["## Integrations", ""]
    for name in (
        "sentence_transformers.FusedMultipleNegativesRankingLoss",
        "transformers.register",
        "transformers.packed_attention_forward",
    ):
        blocks.append(_block(f"l2v_kernels.integrations.{name}", f"l2v_kernels.integrations.{name}", 3))
    return "\n".join(blocks)


def _block(path: str, heading: str, level: int = 2) -> str:
    return f"::: {path}\n    options:\n      heading: {heading}\n      heading_level: {level}\n"


GENERATED = {"<!-- recipe keys -->": recipe_keys.tables, "<!-- kernels -->": kernels}


def main() -> int:
    """Assemble build/docs, then let the site generator check and render it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--serve", action="store_true", help="serve the site on this machine instead of writing it")
    args = parser.parse_args()
    assemble(PAGES)
    command = ["serve"] if args.serve else ["build", "--strict", "--clean"]
    return subprocess.run([sys.executable, "-m", "zensical", *command], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
