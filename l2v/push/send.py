"""Prepare a folder for the Hub and send it."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from l2v.errors import UserError
from l2v.push import prepare, upload
from l2v.push.licence import Licence, find_licence
from l2v.push.subject import HUB_NAMES, Dataset, Model


def push_model(model: Model, args: argparse.Namespace) -> int:
    base = args.base_model or HUB_NAMES.get(model.base, model.base)
    licence = find_licence(model.base, base, args.license, upload.licence_of)
    if Path(base).is_dir() or Path(base).is_absolute():
        raise UserError(f"the base is the folder {base}; give its name on the hub with --base-model")
    repo = repo_name(args.repo, licence, model.name)
    if not (args.dry_run or upload.offline()):
        repo = upload.with_user(repo)
    elif "/" not in repo:
        print(f"{repo} has no user: the code in the card needs USER/{repo}.")
    above = model.folder.parent
    folder = empty_folder(Path(args.dry_run)) if args.dry_run else above / f"hub-{repo.rsplit('/', 1)[-1]}"
    prepare.make_model(
        model, folder, repo, licence, base=base, adapter=args.adapter_only, trust_remote_code=args.trust_remote_code
    )
    if model.evaluation and model.row() is None:
        print("No row of results.json is this model: its card has no scores.")
    elif not model.evaluation:
        print("Not evaluated yet: its card has no scores (l2v eval computes them).")
    code = send(folder, prepare.model_files(folder), repo, "model", args)
    if not args.dry_run and not upload.offline():
        shutil.rmtree(folder, ignore_errors=True)
    return code


def push_dataset(data: Dataset, args: argparse.Namespace) -> int:
    files, notes = prepare.dataset_files(data)
    for note in notes:
        print(f"{data.folder}: {note}")
    repo = repo_name(args.repo, Licence(""), data.name)
    if args.dry_run:
        prepare.copy(data.folder, files, empty_folder(Path(args.dry_run)))
    return send(Path(args.dry_run or data.folder), files, repo, "dataset", args)


def repo_name(given: str | None, licence: Licence, name: str) -> str:
    repo = given or licence.name(name)
    upload.check_repo(repo)
    licence.check_name(repo)
    return repo


def empty_folder(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; choose another folder for --dry-run")
    return folder


def send(folder: Path, files: list[str], repo: str, kind: str, args: argparse.Namespace) -> int:
    size = sum((folder / name).stat().st_size for name in files)
    what = f"{len(files)} files, {_size(size)}, to the {'private ' if args.private else ''}{kind} {repo}"
    again = f"l2v push {folder} {repo}{' --private' if args.private else ''}"
    if args.dry_run or upload.offline():
        why = "Dry run" if args.dry_run else "Offline (HF_HUB_OFFLINE)"
        print(f"{why}: nothing was sent. {folder} holds {what}:")
        for name in files:
            print(f"  {_size((folder / name).stat().st_size):>10}  {name}")
        print(f"To send it: {again}")
        return 0
    print(f"Sending {what} ...", flush=True)
    try:
        address = upload.upload(folder, files, repo, kind, args.private)
    except UserError as error:
        raise UserError(f"{error}. Everything is in {folder}: {again} sends it") from None
    print(address)
    return 0


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "B" else f"{size} B"
        size /= 1000
    return f"{size:.3g} GB"
