"""A process that has imported what our commands import, and becomes one of them by forking: three seconds less a command.

Each command is a process of its own all the same, with its own directory, environment, limits and exit code. Requests
come as lines of JSON on stdin; the answer to each is its exit code.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import traceback
from typing import Any, NoReturn

# Only what a command imports anyway; none of it starts a thread, so that forking is safe.
MODULES = ("launch.cli", "launch.train", "launch.training", "launch.trained", "launch.report", "torch._dynamo")


def serve() -> None:
    for module in MODULES:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become(request)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def become(request: dict[str, Any]) -> NoReturn:
    """Runs `main(arguments)` of the requested module as a command would, and ends the process."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    # What the interpreter does at its start.
    sys.path[:0] = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.argv = [request["module"], *request["arguments"]]
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY | os.O_CREAT),
        (2, request["err"], os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(path, flags), descriptor)
    for kind, limit in request["limits"]:
        resource.setrlimit(kind, (limit, limit))
    code: Any = 1
    try:
        code = sys.modules[request["module"]].main(request["arguments"])
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code))


if __name__ == "__main__":
    serve()
