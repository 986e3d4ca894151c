"""A user's own model or task: a function named in the recipe as `package.module:function`."""

import importlib
from collections.abc import Callable
from typing import Any


def load_function(address: str, key: str) -> Callable[..., Any]:
    """The function at `package.module:function`; `key` is the recipe's key, for the messages.

    ValueError where the module cannot be found or has no such function. An error inside the module is the user's to
    see, and passes as it is.
    """
    module_name, _, function_name = address.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{key} {address}: no module named {error.name!r}; install it or put its folder on PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{key} {address}: {module.__name__} has no function {function_name!r}; define it there")
    return function


def check_methods(thing: object, methods: tuple[str, ...], address: str, key: str, reference: str) -> None:
    """ValueError that names the first of `methods` that `thing` lacks; `reference` is where they are described."""
    for method in methods:
        if not callable(getattr(thing, method, None)):
            raise ValueError(f"{key} {address}: {type(thing).__name__} has no method {method}(); see {reference}")
