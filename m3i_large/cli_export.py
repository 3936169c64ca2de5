"""`m3i export`, `m3i verify`, `m3i import`: weights on their way to other code and back."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from m3i_large.errors import UserError

Force = Annotated[bool, typer.Option(help="Replace what is there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Name = Annotated[str | None, typer.Option(help="The backbone's name, for a file that does not tell.")]
Arch = Annotated[
    list[str] | None, typer.Option("--arch", help="Field of the backbone, key=value, for a file that does not tell.")
]


def export_command(
    path: Annotated[Path, typer.Argument(help="Run or checkpoint directory.")],
    *,
    to: Annotated[str, typer.Option(help="Layout (docs/export.md).")],
    out: Annotated[Path | None, typer.Option(help="File, or directory for hf (default: <path>/export/...).")] = None,
    branch: Annotated[str, typer.Option(help="student, or target for its moving average.")] = "student",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    image_size: Annotated[int | None, typer.Option(help="Resize a ViT's position table to it.", min=1)] = None,
    with_head: Annotated[bool, typer.Option(help="With the official classifier (layout internimage).")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Writes a checkpoint's backbone in the layout of those who use it, and a model card; no GPU needed."""
    from m3i_large.export import LAYOUTS, export

    began = time.perf_counter()
    written, card = export(
        path,
        to=to,
        out=out,
        branch=branch,
        dtype=dtype,
        image_size=image_size,
        with_head=with_head,
        force=force,
    )
    seconds, peak = time.perf_counter() - began, _peak_gib()
    if as_json:
        print(json.dumps({"file": str(written), "seconds": seconds, "peak_gib": peak, "card": card}))
        return
    size, parameters = card["bytes"] / 1e6, card["parameters"]
    print(f"{written}: {card['tensors']} tensors, {parameters:,} parameters, {card['dtype']}, {size:,.1f} MB")
    print(f"{card['backbone']['name']}, {card['branch']}, step {card['step']}; {seconds:.1f} s, peak {peak:.2f} GiB")
    print(f"for {LAYOUTS[to].reader}: {LAYOUTS[to].line.format(file=written)}")


def verify_command(
    file: Annotated[Path, typer.Argument(help="Exported file or directory.")],
    *,
    layout: Annotated[str, typer.Option("--for", help="Layout that it is meant to be.")],
    name: Name = None,
    arch: Arch = None,
    as_json: AsJson = False,
) -> None:
    """Loads a file strictly into its consumer's model: status 2 and the first tensor that is wrong if one is."""
    from m3i_large.export import verify

    found = verify(file, layout=layout, name=name, arch=_fields(arch))
    if as_json:
        print(json.dumps({"file": str(file), "layout": layout, **vars(found)}))
        return
    print(f"{file}: right for {layout}: {found.tensors} tensors, {found.parameters:,} parameters, strictly")
    print(f"shapes of {found.against}; all numbers finite; none as it was initialised ({found.untrained})")


def import_command(
    file: Annotated[Path, typer.Argument(help="File of InternImage, timm, MAE, torchvision, transformers, or ours.")],
    *,
    out: Annotated[Path, typer.Option(help="File to write, .safetensors.")],
    name: Name = None,
    arch: Arch = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Makes published weights a starting point: pretrain with backbone.weights=OUT."""
    from m3i_large.export import import_weights

    read, card = import_weights(file, out=out, name=name, arch=_fields(arch), force=force)
    if as_json:
        print(json.dumps({"file": str(out), "card": card}))
        return
    print(f"{file}: read as {read.layout}, {read.name} {json.dumps(read.arch)}")
    print(f"{out}: {card['tensors']} tensors, {card['parameters']:,} parameters; backbone.weights={out} starts from it")


def _fields(texts: list[str] | None) -> dict[str, Any]:
    from m3i_large.recipe_file import parse_overrides

    fields = dict(parse_overrides(texts or []))
    if dotted := [key for key in fields if "." in key]:
        raise UserError(f"--arch: got {dotted[0]}; needed: a field of the backbone, such as heads=12")
    return fields


def _peak_gib() -> float:
    """Most memory that this process has held, files that it has mapped included."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / 2**30
