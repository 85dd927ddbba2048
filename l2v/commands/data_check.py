"""`l2v data check [FILE|FOLDER|RECIPE]`: check your own data, or a set of passages and questions."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from l2v.commands.parser import new_parser, next_step, quoted
from l2v.data.check.folder import SHIPPED
from l2v.errors import RecipeError
from l2v.model.embedded import SMOLLM2
from l2v.recipe.shipped import recipe_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Check data before training on it; exit code 1 if it cannot be used, or a rule of a set of passages found something."""
    args = parser().parse_args(argv)
    path = Path(args.data).expanduser()
    if (path / "passages.jsonl").is_file():
        from l2v.data.check.report import check_folder

        report = check_folder(args.data)
        print(report.render(None if args.all else 8))
        again = "" if args.data == str(SHIPPED) else f" {quoted(args.data)}"
        print(
            next_step(
                "l2v init NAME --data FILE" if report.ok else f"correct what was found, then l2v data check{again}"
            )
        )
        return 0 if report.ok else 1
    if args.length is not None and args.length < 2:
        raise RecipeError(f"--length is {args.length}; a text needs at least 2 tokens")
    print("\n".join(_lines(args, path)))
    is_recipe = path.suffix in (".yaml", ".yml") or not path.exists()
    print(next_step(f"l2v train {quoted(args.data)}" if is_recipe else f"l2v init NAME --data {quoted(args.data)}"))
    return 0


def _lines(args: argparse.Namespace, path: Path) -> list[str]:
    from l2v.data.find import find_files
    from l2v.data.raw import columns

    shipped = not path.exists() and (recipe_folder() / f"{args.data}.yaml").is_file()
    is_recipe = shipped or path.suffix in (".yaml", ".yml")
    if not is_recipe and len(files := find_files(args.data)) == 1:  # a mistake is answered before torch is loaded
        columns(files[0], args.data)
    from l2v.data.check.own import check_own, check_recipe
    from l2v.data.tokens import TextTokenizer, load_tokenizer
    from l2v.model.embedded import resolve
    from l2v.recipe import Template
    from l2v.recipe.load import load_recipe

    if is_recipe:
        recipe = load_recipe(args.data)
        base = recipe.base
        tokenizer = load_tokenizer(base.tokenizer or resolve(base.model), revision=base.revision)
        return check_recipe(recipe, TextTokenizer.of(tokenizer, base, 512), keep_going=args.keep_going)
    texts = TextTokenizer(load_tokenizer(resolve(args.base)), Template(), args.length or 512)
    return check_own(args.data, texts, keep_going=args.keep_going)


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v data check`."""
    p = new_parser(
        "data check", "Check data before training on it: lengths, duplicates, several answers, leaks, language, bad rows.",
        "questions.csv", "my-recipe.yaml", "my-folder --length 256",
    )  # fmt: skip
    p.add_argument(
        "data", nargs="?", metavar="DATA", default=str(SHIPPED),
        help="a file, a folder, a glob or a recipe; or a folder with passages.jsonl and questions.jsonl (default: the sample "
        "that ships with l2v)",
    )  # fmt: skip
    p.add_argument("--base", default=SMOLLM2, metavar="MODEL", help=f"whose tokens are counted (default: {SMOLLM2})")
    p.add_argument("--length", type=int, metavar="N", help="tokens of a text; longer ones are cut (default: 512)")
    p.add_argument(
        "--keep-going", action="store_true", help="also where more than half of the rows of a source cannot be read"
    )
    p.add_argument("--all", action="store_true", help="of passages and questions: all findings, not eight per rule")
    return p
