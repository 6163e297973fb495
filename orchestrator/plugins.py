"""Plugins: files with components of one's own, which a sweep names under `plugins:`.

A plugin is code. It runs only where a sweep file names it: in the process that reads the file, and
in the workers of its runs, which get the code with their context. Results are read without it.
"""

from __future__ import annotations

import hashlib
import linecache
import sys
import traceback
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from air_core.settings.components import (
    LOADING,
    REGISTRIES,
    Component,
    Loading,
    Registry,
    computed_from_registries,
    use_components,
)


@dataclass(frozen=True)
class Plugin:
    """The code of a plugin.

    Args:
        name: its path, as in the sweep file.
        digest: of its code.
        file: where the code was read, for messages.
        text: the code.
    """

    name: str
    digest: str
    file: str = field(compare=False)
    text: str = field(repr=False)


def read_plugin(name: str, folder: Path) -> Plugin:
    """Read the code of a plugin without running it.

    Args:
        name: path of a .py file, relative to `folder`.

    Raises:
        ValueError: there is no such file.
    """
    file = folder / name
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"the plugin {file} is not a .py file that exists")
    text = file.read_text(encoding="utf-8")
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return Plugin(name, digest, str(file), text)


def use_plugins(plugins: Sequence[Plugin]) -> None:
    """Make the components of these plugins available, in place of those of any others.

    Raises:
        ValueError: the code of a plugin fails, or it adds something that is not allowed; the
            message has file and line.
    """
    use_components([each for plugin in plugins for each in components_of(plugin)])


@cache
def components_of(plugin: Plugin) -> tuple[tuple[Registry, Component], ...]:
    """Run the code of a plugin, once in a process, and return the components that it adds.

    Raises:
        ValueError: as `use_plugins`.
    """
    module = types.ModuleType(f"airsweep_plugin_{plugin.digest[:12]}")
    module.__file__ = plugin.file
    sys.modules[module.__name__] = module  # type hints of its dataclasses are evaluated there
    lines = plugin.text.splitlines(keepends=True)
    linecache.cache[plugin.file] = (len(plugin.text), None, lines, plugin.file)
    found = Loading(plugin.file, plugin.digest)
    token = LOADING.set(found)
    try:
        exec(compile(plugin.text, plugin.file, "exec"), vars(module))
    except Exception as problem:
        raise ValueError(_where_and_why(plugin, problem)) from problem
    finally:
        LOADING.reset(token)
    if not found.components:
        raise ValueError(f"{plugin.file}: the plugin adds no component; use STRATEGIES.add(...)")
    return tuple(found.components)


def place_of(plugin: Plugin, problem: Exception) -> str:
    """File and line of a plugin at which an error was raised, or the file."""
    frames = traceback.extract_tb(problem.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == plugin.file]
    if isinstance(problem, SyntaxError):
        lines = [problem.lineno]
    return f"{plugin.file}:{lines[-1]}" if lines else plugin.file


def _where_and_why(plugin: Plugin, problem: Exception) -> str:
    kind = "" if type(problem) in (TypeError, ValueError) else f"{type(problem).__name__}: "
    return f"{place_of(plugin, problem)}: {kind}{problem}"


@computed_from_registries
@cache
def plugin_versions() -> tuple[tuple[str, str], ...]:
    """Parts of the code that are plugins, with their versions."""
    return tuple(
        (registry.part(name), component.source[:12])
        for registry in REGISTRIES.values()
        for name, component in registry.items()
        if component.source
    )
