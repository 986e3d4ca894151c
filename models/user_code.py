"""A user's own model or task: a function named in the recipe as `package.module:function`."""

import importlib
import importlib.util
import inspect
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


def require_package(address: str, key: str) -> None:
    """ValueError, as `load_function` would raise, where the package is not there at all. Imports nothing."""
    package = address.partition(":")[0].partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{key} {address}: no module named {package!r}; install it or put its folder on PYTHONPATH")


def call_function(function: Callable[..., Any], address: str, key: str, *given: Any, **options: Any) -> Any:
    """Calls a user's function; ValueError where it takes other arguments than these, `key` being its recipe section."""
    try:
        inspect.signature(function).bind(*given, **options)
    except TypeError as error:
        raise ValueError(f"{key}.kind {address}: {error}; correct {key}.options or the function") from None
    return function(*given, **options)


def check_methods(thing: object, methods: tuple[str, ...], address: str, key: str, reference: str) -> None:
    """ValueError that names the first of `methods` that `thing` lacks; `reference` is where they are described."""
    for method in methods:
        if not callable(getattr(thing, method, None)):
            raise ValueError(f"{key} {address}: {type(thing).__name__} has no method {method}(); see {reference}")
