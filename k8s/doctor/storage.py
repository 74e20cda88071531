"""The store, as seen from here: it answers, it honours conditional writes, and pods could see it."""

from __future__ import annotations

from collections.abc import Iterator

from k8s.doctor.finding import Finding
from k8s.reachable import check_store
from k8s.site import Site
from orbit_core.errors import InputError, OrbitError
from orbit_core.store import open_store
from orbit_core.store.checking import check_conditional_writes

PATIENCE_SECONDS = 10.0  # somebody is looking at the terminal


def examine_store(url: str | None, site: Site) -> Iterator[Finding]:
    if not url:
        fix = "set `store` in the site file, or name one: --store s3://bucket/prefix"
        yield Finding("wrong", "store", "none is named", fix)
        return
    try:
        check_store(url, site)
        check_conditional_writes(open_store(url).patient(PATIENCE_SECONDS))
    except InputError as error:
        yield Finding("wrong", "store", _one_line(error), error.fix)
    except (OSError, OrbitError) as error:
        yield Finding("wrong", "store", str(error), "check AWS_ENDPOINT_URL, credentials and bucket")
    else:
        yield Finding("ok", "store", f"{url}: conditional writes are honoured")


def _one_line(error: InputError) -> str:
    expected = f": expected {error.expected}" if error.expected else ""
    return f"{error.what}{expected}" + (f", found {error.found}" if error.found else "")
