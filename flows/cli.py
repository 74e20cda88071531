"""`orbit`: the person's command. Imports stand inside the commands, so that help is instant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from flows.arguments import RecipeArgument, SetOption, StoreOption
from flows.cluster import app as cluster
from flows.promoting import promote, promotions, rollback
from flows.upkeep import gc, redo, verify

app = typer.Typer(
    name="orbit",
    help="RL post-training of large language models on a frozen low-precision base.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

QuietOption = Annotated[bool, typer.Option("--quiet", help="show no progress")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="show the logs of Prefect and of the steps instead")]
JsonOption = Annotated[bool, typer.Option("--json", help="print the outcome as one JSON object on the last line")]


@app.command()
def demo(
    precision: Annotated[str | None, typer.Option(help="int4, fp8, nvfp4, mxfp4 or bf16")] = None,
    adapter: Annotated[str | None, typer.Option(help="oft or lora")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; a GPU computes in bfloat16")] = None,
    store: StoreOption = ".orbit",
    set_: SetOption = [],  # noqa: B006  typer reads the default and passes a fresh list
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """From nothing to a model that learned to carry: two cores, no GPU, about two minutes."""
    from flows.options import demo_recipe
    from flows.running import run_flow, short_errors, show_outcome

    with short_errors():
        recipe = demo_recipe(precision, adapter, seed, device, set_)
        show_outcome(run_flow(recipe, store, quiet, verbose), json)


@app.command()
def run(
    recipe: RecipeArgument,
    store: StoreOption = ".orbit",
    set_: SetOption = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the resolved recipe and what would run")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Run all steps of a recipe; finished ones are reused."""
    from flows.by_hand import show_plan
    from flows.options import load_recipe
    from flows.running import run_flow, short_errors, show_outcome

    with short_errors():
        loaded = load_recipe(recipe, set_)
        if dry_run:
            show_plan(loaded, store)
        else:
            show_outcome(run_flow(loaded, store, quiet, verbose), json)


STEPS = {
    "data": "Prompts for training and the held-out ones, as Parquet.",
    "pretrain": "A small base model pretrained on the spot (model.kind: pretrain).",
    "quantize": "The base in the precision in which it is trained against and deployed.",
    "convert": "The quantised base as a Megatron torch_dist checkpoint, byte for byte.",
    "preflight": "The gate: bytes and log-probabilities of trainer against rollout engine. Exit code 42 if it says no.",
    "train": "The RL loop; stopped or killed, the same command resumes it.",
    "evaluate": "Held-out accuracy before and after, on the same prompts.",
    "publish": "The adapter as a PEFT directory with a manifest of where it came from.",
    "report": "One HTML file: curves, figures and answers before and after.",
}


def _command_of(step: str) -> Callable[..., None]:
    def by_hand(recipe: RecipeArgument, store: StoreOption = ".orbit", set_: SetOption = []) -> None:  # noqa: B006
        from flows.by_hand import run_step_by_hand
        from flows.options import load_recipe
        from flows.running import short_errors

        with short_errors():
            artifact = run_step_by_hand(step, load_recipe(recipe, set_), recipe, store)
            typer.echo(artifact.url)

    return by_hand


for _step, _promise in STEPS.items():
    app.command(_step, help=_promise, rich_help_panel="One step of a recipe")(_command_of(_step))


@app.command()
def rollouts(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="id of a run or its beginning; none: list them")
    ] = None,
    store: StoreOption = ".orbit",
    step: Annotated[int | None, typer.Option(help="show the groups of this step")] = None,
    group: Annotated[int | None, typer.Option(help="show the samples of this group of --step")] = None,
    last: Annotated[int, typer.Option(min=0, help="show this many of the last steps; 0: all")] = 100,
) -> None:
    """What was sampled and how it was judged: steps of a run, groups of a step, samples of a group."""
    from rich.console import Console

    from flows import rollouts as view
    from flows.running import short_errors
    from orbit_core.errors import InputError

    with short_errors():
        if group is not None and step is None:
            raise InputError(f"--group {group}", "--step N beside it", "none")
        if run is None:
            view.show_runs(store, Console())
            return
        reader = view.find_run(store, run)
        if step is None:
            view.show_steps(reader, last, Console())
        elif group is None:
            view.show_groups(reader, step, Console())
        else:
            view.show_group(reader, step, group, Console())


@app.command()
def compact(
    run: Annotated[str, typer.Argument(metavar="RUN", help="id of a run or its beginning")],
    store: StoreOption = ".orbit",
) -> None:
    """Copy the rows of every hundred steps into one file, for whoever scans a whole run; again for what came since."""
    from rich.console import Console

    from flows import rollouts as view
    from flows.running import short_errors

    with short_errors():
        view.compact_run(view.find_run(store, run), Console())


_command: Callable[..., None]
for _command in (promotions, promote, rollback):
    app.command(rich_help_panel="Which adapter serves")(_command)
for _command in (verify, redo, gc):
    app.command(rich_help_panel="Upkeep of a store")(_command)
app.add_typer(cluster, name="k8s")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
