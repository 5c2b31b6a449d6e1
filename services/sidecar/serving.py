"""`opd govern`: the policy file, the token, the port, and everything that runs behind it."""

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import uvicorn

from opd_governor.services.control.server import ServiceError, bind, load_or_create_token
from opd_governor.services.sidecar.app import create_app
from opd_governor.services.sidecar.policy_file import RUN_NAME, PolicyFile, PolicyFileError, load_policy_file
from opd_governor.services.sidecar.runs import Runs
from opd_governor.services.sidecar.scrape import Scraper

BACKLOG = 4096
"""Connections that may wait to be taken: a thousand trainers may begin in one second."""


class ServingError(ValueError):
    """The service cannot be started: one line for the user."""


def serve(policy_path: Path, *, host: str, port: int, out: Path, upstream: str | None, proxy_run: str, say: Callable[[str], None]) -> None:
    """Serve until a signal ends it. Raises ServingError before it listens."""
    try:
        policy = load_policy_file(policy_path)
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
        token = load_or_create_token(out)
        listener = bind(host, port, token)
        listener.listen(BACKLOG)
    except (PolicyFileError, ServiceError) as error:
        raise ServingError(str(error).replace("service.host", "--host").replace("service.port", "--port")) from None
    except OSError as error:
        raise ServingError(f"--out {out}: not writable ({error.strerror}); choose another folder") from None
    runs = Runs(out, policy)
    app = create_app(runs, token)
    where = "http://{}:{}".format(*listener.getsockname()[:2])
    said = f"governing at {where}, {len(runs)} runs so far; token: " + ("OPD_TOKEN" if os.environ.get("OPD_TOKEN") else str(out / "token"))
    served = app
    if upstream is not None:
        served = _proxied(upstream, policy, runs, proxy_run, app)  # type: ignore[assignment]
        said = f"{where} stands in front of {upstream}; its own page: {where}/governor/runs/{proxy_run}/"
    say(said)
    config = uvicorn.Config(
        served,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="on" if upstream else "off",
        # Before another server nothing of ours is added to its answers.
        server_header=upstream is None,
        date_header=upstream is None,
        timeout_graceful_shutdown=5,
    )
    with contextlib.suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(uvicorn.Server(config), listener, [Scraper(scrape, runs) for scrape in policy.scrape]))


def _proxied(upstream: str, policy: PolicyFile, runs: Runs, name: str, app: object) -> object:
    import re
    from urllib.parse import urlsplit

    from opd_governor.services.sidecar.proxy import Proxy, Upstream

    parts = urlsplit(upstream)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ServingError(f"--proxy {upstream}: is no address of a server; give http://HOST:PORT")
    if not re.fullmatch(RUN_NAME, name):
        raise ServingError(f"--run {name}: letters, digits, dot, dash and underscore only, at most 80")
    return Proxy(Upstream(upstream.rstrip("/"), policy.step_answers), runs.open(name), app)  # type: ignore[arg-type]


async def _serve(server: uvicorn.Server, listener: object, scrapers: list[Scraper]) -> None:
    tasks = [asyncio.create_task(scraper.run()) for scraper in scrapers]
    try:
        await server.serve(sockets=[listener])  # type: ignore[list-item]
    finally:
        for task in tasks:
            task.cancel()
