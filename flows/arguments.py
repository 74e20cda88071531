"""Arguments that several commands of `orbit` share. Imports nothing heavy, so that help is instant."""

from __future__ import annotations

from typing import Annotated

import typer

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="YAML file, or the name of one that comes with Orbit")
]
StoreOption = Annotated[str, typer.Option("--store", help="folder or s3://bucket/prefix for artifacts and rollouts")]
SetOption = Annotated[list[str], typer.Option("--set", metavar="A.B=VALUE", help="override a field of the recipe")]
SiteOption = Annotated[
    str | None, typer.Option("--site", help="YAML file of the cluster; default: ORBIT_SITE, else /etc/orbit/site.yaml")
]
