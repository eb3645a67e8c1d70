"""Builds, caches and loads the C++ kernels of the compiled CPU path; nothing here runs before a call needs them.

One library per source, torch version, flags and vector width lies in a cache folder of the user:
$TORCH_EXTENSIONS_DIR, else `saekit_kernels` in $XDG_CACHE_HOME or ~/.cache. A library whose bytes are not those that were
written there is built anew. Processes that want the same library wait for the first of them.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

_log = logging.getLogger(__name__)

SOURCES = sorted((Path(__file__).parent / "csrc").glob("*.cpp"))
_HEADERS = sorted((Path(__file__).parent / "csrc").glob("*.h"))

# No -ffast-math: it would drop NaN, and linked in it changes the rounding of the whole process.
_FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-fvisibility=hidden"]
_FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
# OpenMP is used and not linked: its symbols are those of the runtime that torch brings, so there is one pool of threads.
# Without --no-as-needed a linker may drop torch, which no symbol of ours asks for, and with it that runtime.
_LINK_FLAGS = ["-Wl,--no-as-needed"]
_VECTOR_FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}

# Arguments of each function: p pointer, q int64, d double.
_SIGNATURES = {
    "saekit_topk": "ppppqqqq",
    "saekit_mark_above": "pppppqqqq",
    "saekit_take_marked": "ppppppqqqq",
    "saekit_bag_sums": "pppppppqqq",
    "saekit_bag_dots": "pppppqqq",
    "saekit_value_sums": "ppppqq",
    "saekit_adam": "pppppqqddddddqq",
    "saekit_gradient_square": "pppqqq",
    "saekit_read_chunks": "ppppppqq",
    "saekit_gather_rows": "pppqqqqq",
}
_TYPES = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "d": ctypes.c_double}


class BuildError(RuntimeError):
    """The library cannot be built or loaded here; the message is the reason."""


_lock = threading.Lock()


def why_unavailable(*, notify: bool = False) -> str | None:
    """Why the compiled kernels cannot run in this process, or None; the first call builds or loads them.

    Args:
        notify: log the reason as a warning, once in the process: the caller falls back to torch operators.
    """
    with _lock:
        reason = _first_reason()
    if reason and notify:
        _notify(reason)
    return reason


def library() -> ctypes.CDLL:
    """The loaded kernels of this machine.

    Raises:
        BuildError: they cannot be built or loaded.
    """
    return _library(torch.backends.cpu.get_cpu_capability())


@functools.cache
def _first_reason() -> str | None:
    try:
        library()
    except BuildError as error:
        return str(error)
    return None


@functools.cache
def _notify(reason: str) -> None:
    _log.warning(
        "compiled CPU kernels cannot be used: %s; going on with torch operators, which take a third longer "
        "(SAEKIT_KERNELS=cpu asks for them and silences this)",
        reason,
    )


@functools.cache
def _library(capability: str) -> ctypes.CDLL:
    if platform.system() != "Linux":
        raise BuildError(f"{platform.system()}, needs Linux")
    flags = _FLAGS + (_VECTOR_FLAGS.get(capability, []) if platform.machine() == "x86_64" else [])
    try:
        path = cache_folder() / f"{library_name(flags)}.so"
        # Before anything is written: the folder may be one that was filled elsewhere.
        if found := _cached(path):
            return found
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_process_at_a_time(path.with_suffix(".lock")):
            return _cached(path) or _build(path, flags)
    except BuildError:
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise BuildError(f"cache of compiled kernels: {error}; set TORCH_EXTENSIONS_DIR to a folder") from error


def cache_folder() -> Path:
    """Where the libraries of this user lie."""
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given) / "saekit_kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saekit_kernels"


def library_name(flags: list[str]) -> str:
    """A name that another source, torch, set of flags or kind of processor does not share."""
    digest = hashlib.sha256()
    for path in [*SOURCES, *_HEADERS]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update("\0".join([torch.__version__, platform.machine(), *flags, *_LINK_FLAGS]).encode())
    return f"saekit_kernels_{digest.hexdigest()[:16]}"


def _cached(path: Path) -> ctypes.CDLL | None:
    """The library at `path`; None where there is none, or not the one that was written."""
    try:
        # Mapping a file that was cut off kills the process, so its bytes are compared before.
        if path.with_suffix(".sha256").read_text(encoding="ascii") != _digest(path):
            return None
        return _open(path)
    except (OSError, AttributeError, UnicodeDecodeError):
        return None


def _build(path: Path, flags: list[str]) -> ctypes.CDLL:
    """Compiles in a folder of its own and moves the library into place, so that no one sees half of it."""
    with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as folder, _ninja_on_path():
        built = _compile(path.stem, flags, folder)
        path.with_suffix(".sha256").unlink(missing_ok=True)
        built.replace(path)
        checksum = Path(folder) / "sha256"
        checksum.write_text(_digest(path), encoding="ascii")
        checksum.replace(path.with_suffix(".sha256"))
    try:
        return _open(path)
    except (OSError, AttributeError) as error:
        raise BuildError(f"{str(path)!r}: cannot be loaded: {error}") from error


def _compile(name: str, flags: list[str], folder: str) -> Path:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which((shlex.split(compiler) or [""])[0]) is None:
        raise BuildError(f"there is no C++ compiler {compiler!r}, needs g++ or clang++")
    try:
        with _quiet_loader():
            from torch.utils import cpp_extension

            # Copies, because the loader appends to the lists that it is given.
            cpp_extension.load(
                name,
                [str(source) for source in SOURCES],
                extra_cflags=list(flags),
                extra_ldflags=list(_LINK_FLAGS),
                build_directory=folder,
                with_cuda=False,
                is_python_module=False,
            )
    except Exception as error:  # the loader raises whatever its tools do
        raise BuildError(_cause(error)) from error
    (built,) = Path(folder).glob("*.so")
    return built


def _cause(error: Exception) -> str:
    """The one line that says most of a failed build."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line for line in lines if "error:" in line), lines[0])


def _open(path: Path) -> ctypes.CDLL:
    opened = ctypes.CDLL(str(path))
    for name, kinds in _SIGNATURES.items():
        function = getattr(opened, name)
        function.argtypes, function.restype = [_TYPES[kind] for kind in kinds], None
    return opened


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def _one_process_at_a_time(path: Path) -> Iterator[None]:
    """Holds a lock that ends with the process, however it ends; without one where the file system has none."""
    import fcntl

    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _quiet_loader() -> Iterator[None]:
    """Silences what torch says of compilers that it does not know: the reason of a failure is told once, by us."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Finds a ninja that was installed beside this Python, as one that is called without activating its environment."""
    before = os.environ.get("PATH", "")
    if shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before
