"""A small web service that starts, watches and stops training jobs. It needs FastAPI and uvicorn (SGLang brings both;
else ``pip install fastapi uvicorn``).

    JOBS_TOKEN=... python examples/embedding/service.py --port 8080
    curl -H "Authorization: Bearer $JOBS_TOKEN" -d '{"flags": ["--hf-checkpoint", "MODEL", ...]}' \\
        -H "Content-Type: application/json" http://127.0.0.1:8080/jobs

Flags name user code, so whoever may start a job may run anything: the token is the key to this user's account. It
listens on loopback; put TLS and your own login in front of it.
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel

from miles.flags.problems import FlagProblems
from miles_agents.errors import MilesError
from miles_launcher import FixedNodes, Job, LocalNode

jobs: dict[str, Job] = {}


class Wanted(BaseModel):
    """What a client sends: the flags of train.py, one word each."""

    flags: list[str]


@asynccontextmanager
async def all_end(_: FastAPI) -> AsyncIterator[None]:
    """When the service is stopped, so are its jobs, each in good order."""
    yield
    for job in jobs.values():
        await job.cancel("the service is shut down")


def known(request: Request) -> None:
    """Refuse whoever does not have the token."""
    given = request.headers.get("authorization", "")
    if not hmac.compare_digest(given.encode(), f"Bearer {os.environ['JOBS_TOKEN']}".encode()):
        raise HTTPException(401, "the token is missing or wrong")


app = FastAPI(lifespan=all_end, dependencies=[Depends(known)])


@app.exception_handler(FlagProblems)
async def bad_flags(_: Request, error: FlagProblems) -> JSONResponse:
    """All problems at once, as data."""
    return JSONResponse({"problems": [problem.as_dict() for problem in error.problems]}, 422)


@app.exception_handler(MilesError)
async def failed(_: Request, error: MilesError) -> JSONResponse:
    """Errors have a code that programs can rely on."""
    return JSONResponse({"code": error.code, "error": str(error)}, 409)


@app.post("/jobs", status_code=201)
async def start(wanted: Wanted) -> dict[str, Any]:
    """Check the flags, start the job."""
    job = await Job.from_flags(wanted.flags, nodes=FixedNodes(LocalNode()), name=f"job-{len(jobs)}")
    jobs[job.name] = job
    job.start()
    return {"name": job.name, "run_dir": str(job.run_dir), "notices": job.notices}


@app.get("/jobs")
async def listed() -> list[dict[str, Any]]:
    """All jobs of this service."""
    return [{"name": job.name, "state": job.state, "run_dir": str(job.run_dir)} for job in jobs.values()]


@app.get("/jobs/{name}")
async def status(name: str) -> dict[str, Any]:
    """What a job does, node by node and rank by rank."""
    return job_of(name).status().plain()


@app.get("/jobs/{name}/metrics")
async def metrics(name: str) -> list[dict[str, Any]]:
    """A line for each iteration."""
    return job_of(name).metrics()


@app.get("/jobs/{name}/events")
async def events(name: str) -> StreamingResponse:
    """What happens, from the beginning on, as JSON lines, until the job has ended."""
    job = job_of(name)

    async def lines() -> AsyncIterator[str]:
        async for event in job.events():
            yield json.dumps(event.plain(), default=str) + "\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


@app.delete("/jobs/{name}")
async def stop(name: str) -> dict[str, Any]:
    """End a job in good order; answers when it has."""
    job = job_of(name)
    await job.cancel("a client stopped it")
    return {"name": name, "state": job.state}


def job_of(name: str) -> Job:
    """Raises a 404."""
    if name not in jobs:
        raise HTTPException(404, f"there is no job {name}")
    return jobs[name]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--unix-socket", metavar="PATH", help="listen there and on no port")
    options = parser.parse_args()
    if not os.environ.get("JOBS_TOKEN"):
        parser.error("set JOBS_TOKEN to a secret of your own")
    uvicorn.run(app, host="127.0.0.1", port=options.port, uds=options.unix_socket, log_level="warning")
