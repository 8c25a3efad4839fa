"""Prints every route of a server's own application, as JSON lists of kind (http, websocket), method and path.

`python server_routes.py prefect|mlflow`, in the environment that the server has: routes depend on settings. Refused: a
kind of route that is not known here, which could hide others.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from fastapi.routing import iter_route_contexts
from starlette.routing import BaseRoute, Mount, WebSocketRoute
from starlette.staticfiles import StaticFiles

Route = tuple[str, str, str]


def of(routes: Iterable[BaseRoute], prefix: str = "") -> Iterator[Route]:
    for each in iter_route_contexts(list(routes)):
        route = each.original_route
        if isinstance(route, Mount):
            yield from of_mounted(route.app, prefix + route.path)
        elif isinstance(route, WebSocketRoute):
            yield "websocket", "GET", f"{prefix}{each.path}"
        elif each.methods:
            yield from (("http", method, f"{prefix}{each.path}") for method in each.methods)
        else:
            raise TypeError(f"{route!r} is a kind of route that this does not know")


def of_mounted(app: Any, prefix: str) -> Iterator[Route]:
    if hasattr(app, "routes"):
        yield from of(app.routes, prefix)
        for group in getattr(app.router, "_low_priority_routes", []):  # FastAPI's pages, for what no route has
            for each in group.routes:
                yield from (("http", method, f"{prefix}{each.path.rstrip('/')}/{{file}}") for method in each.methods)
    elif isinstance(app, StaticFiles):
        yield "http", "GET", f"{prefix}/{{file}}"
    elif hasattr(app.app, "url_map"):  # MLflow's Flask application in its adapter
        for rule in app.app.url_map.iter_rules():
            yield from (("http", method, f"{prefix}{rule}") for method in rule.methods)
    else:
        raise TypeError(f"{app!r} is mounted at {prefix} and its routes cannot be asked for")


if __name__ == "__main__":
    if sys.argv[1] == "prefect":
        from prefect.server.api.server import create_app

        routes = of_mounted(create_app(), "")
    else:
        from mlflow.server.auth import create_app as create_mlflow

        routes = of_mounted(create_mlflow(), "")
    print(json.dumps(sorted(set(routes))))
