"""`l2v push RUN|EXPORT|DATASET [REPO]`: publish on the Hub with a card."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from l2v.commands.parser import add_loading, new_parser
from l2v.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Publish an encoder, its adapters or a data set on the Hugging Face Hub, with a card.

    The token is the hub's own: HF_TOKEN, or the one of 'hf auth login'.
    """
    args = parser().parse_intermixed_args(argv)
    # Imported here: help and mistakes in the arguments need no torch.
    from l2v.model.licence import CARD, Licence, front_matter
    from l2v.push import prepare
    from l2v.push.licence import check_papers
    from l2v.push.send import empty_folder, push_dataset, push_model, repo_name, send
    from l2v.push.subject import Dataset, Model, Ready, find

    source = find(Path(args.source), Path(args.results) if args.results else None)
    if args.adapter_only and not (isinstance(source, Model) and not source.export):
        raise UserError(f"{args.source}: --adapter-only needs a run or a stage of it")
    if isinstance(source, Dataset):
        return push_dataset(source, args)
    if isinstance(source, Ready):
        check_papers(source.folder)
        licence = Licence.of(str(front_matter(source.folder / CARD).get("license", "")))
        repo = repo_name(args.repo, licence, source.name)
        if args.dry_run:
            prepare.copy(source.folder, prepare.model_files(source.folder), empty_folder(Path(args.dry_run)))
        return send(Path(args.dry_run or source.folder), prepare.model_files(source.folder), repo, "model", args)
    return push_model(source, args)


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v push`."""
    p = new_parser(
        "push", "Publish an encoder, its adapters or a data set on the Hugging Face Hub, with a card.",
        "runs/llama3-8b-da me/Llama-3-dansk --dry-run ready", "ready me/Llama-3-dansk --private",
    )  # fmt: skip
    p.add_argument("source", metavar="SOURCE", help="a run, a stage of it, an export, or a built data set")
    p.add_argument(
        "repo", metavar="REPO", nargs="?", help="name on the hub, USER/NAME (default: the run's or data set's name)"
    )
    p.add_argument("--private", action="store_true", help="create a private repository")
    p.add_argument("--dry-run", metavar="FOLDER", help="write the folder and list the files, but send nothing")
    p.add_argument("--adapter-only", action="store_true", help="the LoRA adapters instead of a merged encoder")
    p.add_argument(
        "--license", metavar="ID", help="the base's licence, by its identifier on the hub (default: that of its card)"
    )
    p.add_argument("--base-model", metavar="NAME", help="the base's name on the hub, if the run uses a folder")
    p.add_argument("--results", metavar="FILE", help="scores of the card (default: RUN/eval/results.json)")
    add_loading(p, precision=False)
    return p
