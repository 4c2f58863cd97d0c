"""threadpoolctl's controls govern fastrnn's threads as those of BLAS and OpenMP.

    with threadpoolctl.threadpool_limits(limits=1):    # or ThreadpoolController().limit(limits=1)
        y, state = lstm(x)

threadpoolctl looks through the shared objects of the process for the ones that a registered
controller class knows; ours knows the extension module. It registers itself, whichever of the two
packages is imported first, and without importing threadpoolctl when the program does not.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

from fastrnn import _core

__all__ = ["register_threadpoolctl"]

_NAME = "threadpoolctl"
_MOST = 1024  # threads; a limit beyond it, meant for another library, is none for us


def register_threadpoolctl() -> None:
    """Lets ``threadpoolctl`` (3.2 or newer) see and limit fastrnn's threads.

    Importing fastrnn sees to it, so that there is rarely a reason to call this; doing so again is
    harmless. From then on ``threadpoolctl.threadpool_info()`` lists an entry with ``user_api``
    ``"fastrnn"``, and ``threadpool_limits(limits=n)`` sets the number of threads as
    ``fastrnn.set_num_threads(n)`` would, of the whole process, and puts it back afterwards; so does
    ``limits={"fastrnn": n}`` for fastrnn alone. No result depends on the number of threads.

    Raises:
        ImportError: threadpoolctl is not installed.
        RuntimeError: It is older than 3.2, and cannot be told of other libraries.
    """
    import threadpoolctl

    if hasattr(threadpoolctl, "_fastrnn_controller"):
        return
    if not hasattr(threadpoolctl, "register"):
        raise RuntimeError(
            f"threadpoolctl: expected version 3.2 or newer, got {threadpoolctl.__version__}"
        )
    controller = _controller(threadpoolctl.LibController)
    threadpoolctl._fastrnn_controller = controller
    threadpoolctl.register(controller)


def _controller(base: Any) -> Any:
    extension = os.path.realpath(_core.__file__)

    class FastrnnController(base):  # type: ignore[misc]  # threadpoolctl has no types
        """Takes the place of the shared library's own functions by the extension's."""

        user_api = "fastrnn"
        internal_api = "fastrnn"
        filename_prefixes = (os.path.basename(extension).split(".")[0].lower(),)
        check_symbols = ("PyInit__core",)

        def set_additional_attributes(self) -> None:
            # Other packages have a module _core, too. threadpoolctl (from 3.3 on) drops a library
            # without any of check_symbols.
            if os.path.realpath(self.filepath) != extension:
                self.dynlib = None

        def get_num_threads(self) -> int:
            return _core.get_num_threads()

        def set_num_threads(self, num_threads: int) -> None:
            _core.set_num_threads(min(num_threads, _MOST))

        def get_version(self) -> str:
            return str(_core.compiled()["version"])

    return FastrnnController


class _AtImport:
    """An import hook that registers as soon as the program imports threadpoolctl, and is gone."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if fullname != _NAME:
            return None
        import importlib.util  # here, since it takes longer to import than all the rest

        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        loader: Any = spec and spec.loader
        if loader is not None:
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if hasattr(module, "register"):
                    register_threadpoolctl()

            loader.exec_module = execute_and_register
        return spec


def register_at_import() -> None:
    """Registers now if threadpoolctl is there, else when the program imports it."""
    module = sys.modules.get(_NAME)
    if module is None:
        sys.meta_path.insert(0, _AtImport())
    elif hasattr(module, "register"):
        register_threadpoolctl()
