"""The Jobs of a recipe as YAML, without a cluster: every name and digest is known before anything runs."""

from __future__ import annotations

from collections.abc import Iterator

from k8s.manifests import job, to_yaml
from k8s.site import Site
from k8s.sizing import resources_of
from orbit_core.errors import InputError
from orbit_core.pipeline import plan
from orbit_core.recipe import Recipe


def render(recipe: Recipe, site: Site, store: str | None = None) -> Iterator[str]:
    """One YAML document per step, in the order in which a run creates them; the first begins with a comment.

    `store` defaults to the site's. Neither it nor the cluster is contacted; files that the recipe names are read.
    """
    url = _store(site, store)
    specs = plan(recipe, url)
    jobs = [job(spec, resources_of(recipe, step), site) for step, spec in specs.items()]
    yield (
        f"# {len(jobs)} Jobs of recipe {recipe.name}, store {url}, in the order in which a run creates them.\n"
        "# To look at and to check (kubectl apply --dry-run=server -f -); a run creates each when those before it are\n"
        "# done, because it reads their artifacts.\n"
    )
    yield from ("---\n" + to_yaml(each) for each in jobs)


def render_spec(recipe: Recipe, site: Site, step: str, store: str | None = None) -> str:
    """What `--spec` of one step reads, as JSON, after the checks that its Job would have had."""
    specs = plan(recipe, _store(site, store))
    if step not in specs:
        raise InputError(f"step {step}", f"one of this recipe's steps: {', '.join(specs)}", step)
    job(specs[step], resources_of(recipe, step), site)
    return specs[step].model_dump_json(indent=2) + "\n"


def _store(site: Site, store: str | None) -> str:
    url = store or site.store
    if url is None:
        raise InputError("store", "--store, or `store` in the site file", "neither", "e.g. --store s3://bucket/prefix")
    return url
