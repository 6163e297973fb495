"""Commands about datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands.common import JsonOption, fail, watched
from orchestrator.output import show

app = typer.Typer(no_args_is_help=True, help="Check datasets.")


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
