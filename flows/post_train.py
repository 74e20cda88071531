"""The flow: from a base model to a published adapter and a report of what it learned.

Deployed (k8s/prefect.yaml), scheduled, watched and retried on Prefect; `orbit demo` and `orbit run` call the same
function. Every step is adopted from the store if it is finished, so a Retry redoes only what is missing.
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.outcome import outcome
from orbit_core.pipeline import plan
from orbit_core.recipe import Recipe
from tasks import steps
from tasks.executors import executor_for


@flow(name="post-train")
def post_train(recipe: Recipe, store: str = ".orbit") -> dict[str, Any]:
    """RL post-training on a frozen low-precision base.

    Args:
        recipe: model, precision, adapter, data, reward, algorithm and engines of the run.
        store: folder or s3://bucket/prefix where artifacts and rollouts are kept.
    """
    spec, executor = plan(recipe, store), executor_for(recipe)

    done = {"data": steps.data(spec["data"], executor)}
    if "pretrain" in spec:
        done["pretrain"] = steps.pretrain(spec["pretrain"], executor)
    done["quantize"] = steps.quantize(spec["quantize"], executor)
    done["convert"] = steps.convert(spec["convert"], executor)
    done["preflight"] = steps.preflight(spec["preflight"], executor)
    done["train"] = steps.train(spec["train"], executor)
    done["evaluate"] = steps.evaluate(spec["evaluate"], executor)
    done["publish"] = steps.publish(spec["publish"], executor)
    done["report"] = steps.report(spec["report"], executor)
    return outcome(done)
