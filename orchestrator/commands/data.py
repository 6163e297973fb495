"""Commands about datasets."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands.common import (
    ChecksumOption,
    JsonOption,
    VerifyOption,
    fail,
    watched,
)
from orchestrator.output import show

app = typer.Typer(no_args_is_help=True, help="Look at datasets, and put them where all read them.")


@app.command("check")
def data_check(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a dataset, or folder:PATH")],
    root: Annotated[
        Path | None,
        typer.Option(
            "--root", "--data-root", envvar="AIRSWEEP_DATA", help="folder of real datasets"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare a dataset with the published one and open every image.

    Ends with 0 when all fits, else with 2 and the first difference.

    airsweep data check flowers102 --root /data

    airsweep data check folder:/data/leaves --json
    """
    from orchestrator.datacheck import check

    found = check(name, root, lambda each, total: watched("opening images", each, total))
    for line in [json.dumps(found.json(), indent=1)] if as_json else found.lines():
        show(line)
    if found.difference is not None:
        fail(found.difference)


@app.command("stage")
def data_stage(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a dataset, or folder:PATH")],
    to: Annotated[Path, typer.Option("--to", metavar="ROOT", help="the data root")],
    given: Annotated[
        list[Path] | None,
        typer.Option(
            "--from", metavar="PATH", help="an archive, a list, an unpacked folder; may repeat"
        ),
    ] = None,
    checksum: ChecksumOption = None,
    verify: VerifyOption = False,
    as_json: JsonOption = False,
) -> None:
    """Unpack a downloaded dataset on shared storage and check it, once; opens no network.

    airsweep data stage dtd --from dtd-r1.0.1.tar.gz --to /shared/data

    airsweep data stage folder:leaves --to /shared/data

    Called again it looks whether all is there still. Ends with 2 where the archives are damaged,
    not harmless, or not the published dataset; with 3 where there is no room.
    """
    from orchestrator.staging import stage_dataset

    root = to.absolute()
    found = stage_dataset(
        name, given or (), root, checksum or (), verify, watched, partial(show, file=sys.stderr)
    )
    own = name.startswith("folder:")
    use = {"dataset": f"folder:{found.place}"} if own else {"data_root": str(root)}
    if as_json:
        show(json.dumps({**found.json(), "use": use}, indent=1))
        return
    checked = found.manifest["checked"]
    show(found.line())
    show(f"{checked['images']:,} images of {checked['classes']} classes")
    show(
        f"in the sweep file, below fixed:  dataset: folder:{found.place}"
        if own
        else f"use it with --data-root {root}, or AIRSWEEP_DATA={root}"
    )
