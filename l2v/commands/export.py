"""`l2v export RUN FOLDER`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from l2v.commands.parser import add_loading, new_parser
from l2v.errors import UserError
from l2v.runs.names import check_model


def main(argv: Sequence[str] | None = None) -> int:
    """Merge an encoder and write it for transformers and sentence-transformers."""
    args = parser().parse_intermixed_args(argv)
    check_model(args.run)
    adapters = [name for name in args.adapter if name]
    if args.adapter_only or len(adapters) < len(args.adapter):
        return _adapter(args, adapters)
    _check_formats(args)
    from l2v.encoder import Encoder  # loads torch and transformers, for which a mistyped name does not wait

    encoder = Encoder.from_pretrained(
        args.run, adapters, precision=args.precision, length=args.length, trust_remote_code=args.trust_remote_code
    )
    if gone := [name for name in ("onnx", "gguf") if (Path(args.folder) / name).is_dir() and not getattr(args, name)]:
        print(f"l2v: {args.folder} is replaced as a whole, and its {' and '.join(gone)} files go", file=sys.stderr)
    table = encoder.save(args.folder, args.engines)
    dtype = "bf16" if "bfloat16" in str(encoder.model.decoder.dtype) else "fp32"
    print(
        f"{args.folder}: written, {dtype}, texts of up to {encoder.max_length} tokens; "
        f"SentenceTransformer('{args.folder}') loads it"
    )
    width = max(len(engine.name) for engine in table)
    for engine in table:
        print(f"  {engine.name:{width}}  {engine.vectors or f'not for it: {engine.refused}'}")
    _further_formats(args)
    folder = shlex.quote(args.folder)
    print(
        f"next: l2v verify {folder}, l2v search {folder} --texts FILE, or l2v push {folder} OWNER/NAME", file=sys.stderr
    )
    return 0


def _adapter(args: argparse.Namespace, adapters: list[str]) -> int:
    if args.engines:
        raise UserError("--for is for merged exports; an adapter is read by PEFT and vLLM")
    if args.onnx or args.gguf:
        raise UserError("--onnx and --gguf are for merged exports; an adapter is read by PEFT and vLLM")
    from l2v.serving.adapter import export_adapter

    done = export_adapter(
        args.run, Path(args.folder), adapters, length=args.length, precision=args.precision,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    print(
        f"{args.folder}: written, {done.stages} adapters as one of rank {done.rank}; in {done.precision}, its vectors are at "
        f"most {done.entry:.1g} in an entry and {done.cosine:.1g} in 1 - cosine off those of the merged encoder"
    )
    print(
        f"next: docs/serving.md, one base for chat and vectors; vLLM needs --max-lora-rank {done.rank}", file=sys.stderr
    )
    return 0


def _check_formats(args: argparse.Namespace) -> None:
    """Raises UserError for formats that cannot be written, before anything is loaded."""
    if args.onnx:
        from l2v.formats import onnx_engine
        from l2v.formats.facts import need

        onnx_engine.check_precisions(args.onnx)
        need("onnx", *onnx_engine.WRITING)
    if args.gguf:
        from l2v.formats import gguf_engine
        from l2v.formats.facts import need

        gguf_engine.check_precisions(args.gguf)
        need("gguf", "llama_cpp")


def _further_formats(args: argparse.Namespace) -> None:
    """ONNX and GGUF files, where asked for; what each is worth."""
    if args.onnx:
        from l2v.formats.onnx_export import write_onnx

        for graph in write_onnx(args.folder, args.onnx):
            kept = f"; {len(graph.floats)} layers in float32: {', '.join(graph.floats)}" if graph.floats else ""
            print(f"{graph.file}: written, {graph.precision}, 1 - cosine to fp32 at most {graph.cosine:.1e}{kept}")
    if args.gguf:
        from l2v.formats.gguf_export import write_gguf

        for file in write_gguf(args.folder, args.gguf):
            note = f"; {file.note}" if file.note else ""
            print(f"{file.file}: written, {file.precision}, 1 - cosine to fp32 at most {file.cosine:.1e}{note}")


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v export`."""
    p = new_parser(
        "export",
        "Merge an encoder and write it for transformers and sentence-transformers.",
        "runs/llama3-8b-da my-encoder --for vllm,tei",
        "runs/llama3-8b-da my-encoder --precision bf16 --length 1024",
        "runs/llama3-8b-da my-encoder --onnx fp32,int8 --gguf f16",
    )  # fmt: skip
    p.add_argument("run", metavar="MODEL", help="a run, a stage of it, or a base")
    p.add_argument("folder", metavar="FOLDER", help="where to write")
    p.add_argument(
        "--adapter", action="append", nargs="?", const="", default=[], metavar="NAME",
        help="a further adapter, merged in order; without NAME: --adapter-only",
    )  # fmt: skip
    p.add_argument(
        "--adapter-only", action="store_true",
        help="write all stages as one unmerged LoRA adapter, so that one base serves chat and vectors (PEFT, vLLM)",
    )  # fmt: skip
    p.add_argument("--length", type=int, metavar="N", help="tokens of a text (default: the run's, or 512)")
    p.add_argument(
        "--onnx", type=_names, default=[], metavar="PRECISIONS",
        help="also ONNX graphs: fp32, fp16, int8, comma between them (needs the extra onnx)",
    )  # fmt: skip
    p.add_argument(
        "--gguf", type=_names, default=[], metavar="PRECISIONS",
        help="also files for llama.cpp: f16, q8_0, comma between them (needs the extra gguf)",
    )  # fmt: skip
    p.add_argument(
        "--for", dest="engines", type=_names, default=[], metavar="ENGINES",
        help="fail unless these engines give its vectors: transformers, sentence-transformers, vllm, tei, comma between them "
        "(default: write for all that can, and print which)",
    )  # fmt: skip
    add_loading(p)
    return p


def _names(value: str) -> list[str]:
    return [name.strip() for name in value.split(",")]
