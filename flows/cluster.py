"""`orbit k8s`: what a person asks about the cluster. Imports stand inside the commands, as in flows/cli.py."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.arguments import RecipeArgument, SetOption, SiteOption

app = typer.Typer(help="Steps as Kubernetes Jobs: what would be created, and whether the cluster is ready.")


@app.callback()
def _group() -> None:
    """Keeps `orbit k8s COMMAND` a group while it has a single command."""


@app.command()
def render(
    recipe: RecipeArgument,
    site: SiteOption = None,
    store: Annotated[str | None, typer.Option("--store", help="s3://bucket/prefix or a folder that pods mount")] = None,
    set_: SetOption = [],  # noqa: B006  typer reads the default and passes a fresh list
    spec: Annotated[
        str | None, typer.Option("--spec", metavar="STEP", help="only what this step reads, as JSON")
    ] = None,
) -> None:
    """The Jobs of a recipe as YAML, for reading and for `kubectl apply --dry-run=server -f -`."""
    from flows.options import load_recipe
    from flows.running import short_errors
    from k8s.render import render as documents
    from k8s.render import render_spec
    from k8s.site import Site

    with short_errors():
        loaded, cluster = load_recipe(recipe, set_), Site.load(site)
        for text in [render_spec(loaded, cluster, spec, store)] if spec else documents(loaded, cluster, store):
            typer.echo(text, nl=False)


@app.command()
def setup() -> None:
    """Make the work pools and the automation that Orbit needs on the Prefect server; what is there is left."""
    from flows.running import short_errors
    from orbit_core.errors import InputError

    with short_errors():
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_API_URL, get_current_settings

        from k8s.orchestration import prepare

        heartbeat = get_current_settings().flows.heartbeat_frequency
        if not PREFECT_API_URL.value():
            raise InputError("PREFECT_API_URL", "the API of a Prefect server", "not set", "prefect server start")
        if heartbeat is None:
            raise InputError("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "seconds, or unset (180)", "none", "unset it")
        with get_client(sync_client=True) as client:
            for line in prepare(client, heartbeat):
                typer.echo(line)


@app.command()
def doctor(
    site: SiteOption = None,
    store: Annotated[str | None, typer.Option("--store", help="default: that of the site file")] = None,
    probe: Annotated[bool, typer.Option("--probe", help="also run a small step in a real Job, and clean up")] = False,
    gpus: Annotated[int, typer.Option(help="of the probe's Job; 0: the CPU image", min=0)] = 0,
) -> None:
    """Would a run start here? One line for each thing looked at; exit code 42 if one is wrong."""
    from flows.running import short_errors
    from k8s.doctor import examine
    from k8s.site import Site
    from orbit_core.errors import ExitCode

    with short_errors():
        wrong = 0
        for finding in examine(Site.load(site), store, probe or gpus > 0, gpus):
            wrong += finding.level == "wrong"
            typer.echo(str(finding))
        if wrong:
            raise typer.Exit(int(ExitCode.REFUSED))
