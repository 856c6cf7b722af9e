# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
"""The actions, errors and results of hostile targets; `hostile_target` has the table of the behaviours."""

import ctypes
import locale
import mmap
import os
import platform
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from typing import Any

import numpy

from mha_spec import reference


def attend(query, key, value) -> Any:
    """Compute the right output."""
    return reference.attention(query, key, value)


def then_attend(action):
    """Make a behaviour of an action, after which the output is right."""

    def behave(query, key, value):
        action()
        return attend(query, key, value)

    return behave


def and_attend(action):
    """Make a behaviour of an action that follows the computation of the right output."""

    def behave(query, key, value):
        output = attend(query, key, value)
        action()
        return output

    return behave


def raising(error):
    """Make a behaviour that raises an error."""

    def behave(*arguments, **options):
        raise error() if isinstance(error, type) else error

    return behave


# ---- Exceptions and results that cannot be read ----


class NoText(BaseException):
    """An exception without a text."""

    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


class NumberAsText(Exception):
    """An exception whose text is a number."""

    def __str__(self):
        return 7


class Unpicklable(Exception):
    """An exception that cannot be pickled."""

    def __reduce__(self):
        raise RuntimeError("no pickles")


class Nameless(type):
    """The class of a class that has no name."""

    @property
    def __name__(cls):
        raise RuntimeError("no name")


class NamelessError(Exception, metaclass=Nameless):
    """An exception of a class that has no name."""


class EndlessText(str):
    """A string that cannot be measured, cut or joined."""

    __slots__ = ()

    def __len__(self):
        raise RuntimeError("no length")

    __getitem__ = __add__ = __radd__ = splitlines = strip = __iter__ = __len__


class OddText(Exception):
    """An exception whose text is a string that cannot be measured."""

    def __str__(self):
        return EndlessText("odd")


class OddTuple(tuple):
    """A tuple without a length."""

    def __len__(self):
        raise RuntimeError("no length")


class Guarded(numpy.ndarray):
    """An array that can be neither copied nor pickled."""

    def __array_finalize__(self, other):
        pass

    def copy(self, *arguments, **options):
        raise RuntimeError("no copies")

    def __reduce__(self):
        raise RuntimeError("no pickles")

    def __array_ufunc__(self, *arguments, **options):
        raise RuntimeError("no functions")

    def __array__(self, *arguments, **options):
        raise RuntimeError("no conversions")


class Immense(numpy.ndarray):
    """An array that says that it is larger than all memory."""

    shape = property(lambda self: (10**30,))


class Shapeless(numpy.ndarray):
    """An array that says that it has no shape."""

    @property
    def shape(self):
        raise RuntimeError("no shape")


class OddlyShaped(numpy.ndarray):
    """An array that says that its lengths are words."""

    shape = property(lambda self: ("one", "two"))


class Lazy:
    """An object with a dtype that fails when it is read."""

    dtype = numpy.dtype("float32")

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("the graph is gone")


class Pointer:
    """An object that names memory that it does not have."""

    __array_interface__ = {"shape": (2,), "typestr": "<f4", "data": (8, False), "version": 3}  # noqa: RUF012


# ---- Actions ----


def write_to_pipes(text):
    """Write to every pipe of this process, except the standard ones."""
    for descriptor in range(3, 64):
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith("pipe:"):
                os.write(descriptor, text)
        except OSError:
            pass


def redirect_everything():
    """Redirect every descriptor of this process, except the standard ones, to the null device."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in set(map(int, os.listdir("/proc/self/fd"))) - {0, 1, 2, nowhere}:
        os.dup2(nowhere, descriptor)


def fork(action):
    """Fork, and let the child act and then end."""
    if os.fork() == 0:
        action()
        os._exit(0)


def become_daemon():
    """Continue in a child, and end this process."""
    if os.fork():
        os._exit(0)
    os.setsid()


def lose_folder():
    """Remove the working folder."""
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)


def lose_files():
    """Remove the files of the run, also those that the runner writes in the meantime."""
    for value in os.environ.values():
        while os.path.isabs(value) and os.path.isdir(value) and "mha-spec-" in value:
            shutil.rmtree(value, ignore_errors=True)


def recurse():
    """Recurse without end."""
    return recurse()


def recurse_in_c():
    """Recurse in C code without end."""
    sys.setrecursionlimit(10**9)

    def compare(x):
        return sorted([1], key=compare)

    compare(0)


def ignore_signals():
    """Ignore every signal that can be ignored."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)


def touch_cut_file():
    """Read a mapped file after it was cut."""
    file = os.memfd_create("cut")
    os.ftruncate(file, 2**20)
    mapped = mmap.mmap(file, 2**20)
    os.ftruncate(file, 0)
    return mapped[2**19]


def free_twice():
    """Free memory twice."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    memory = libc.malloc(ctypes.c_size_t(24))
    for _ in range(2):
        libc.free(ctypes.c_void_p(memory))


def write_to_constant():
    """Write to memory that is read-only."""
    ctypes.memset(ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value, 0, 16)


def leak_descriptors():
    """Open files until there are no more descriptors."""
    try:
        while True:
            os.open(os.devnull, os.O_RDONLY)
    except OSError:
        pass


def limit(name, size):
    """Set a limit of this process."""
    resource.setrlimit(getattr(resource, name), (size, resource.getrlimit(getattr(resource, name))[1]))


def round_up():
    """Let the processor round all results up."""
    ctypes.CDLL("libm.so.6").fesetround({"x86_64": 0x800, "aarch64": 0x400000}.get(platform.machine(), 0))


def flush_subnormals():
    """Let the processor replace subnormal numbers by 0, as compilers with -ffast-math do."""
    if platform.machine() == "x86_64":
        libm, state = ctypes.CDLL("libm.so.6"), (ctypes.c_uint32 * 8)()
        libm.fegetenv(state)
        state[7] |= 0x8040
        libm.fesetenv(state)


def set_locale():
    """Write numbers as in German, if the system has that."""
    for name in ("de_DE.UTF-8", "de_DE", "C"):
        try:
            return locale.setlocale(locale.LC_ALL, name)
        except locale.Error:
            continue


def exit_at_numpy_errors():
    """End the process at the next overflow, division by 0 or invalid operation of NumPy."""
    numpy.seterr(all="call")
    numpy.seterrcall(lambda *_: os._exit(9))


def print_for_a_while():
    """Print in a thread that continues after the call."""

    def print_lines():
        for _ in range(100):
            os.write(1, b"noise\n")
            time.sleep(0.005)

    threading.Thread(target=print_lines, daemon=True).start()


def print_without_end():
    """Print for ever."""
    while True:
        os.write(1, b"x\n" * 2**15)


def replace_in(module, *names):
    """Replace functions of a module by others that raise, until the next case begins."""
    for name in names:
        REPLACED.setdefault(module, {}).setdefault(name, getattr(module, name))
        setattr(module, name, raising(RuntimeError("replaced")))


REPLACED = {}
"""The functions of each module that a behaviour replaced: the behaviours that follow in the same process need them."""


def warn_as_error():
    """Raise a warning."""
    warnings.simplefilter("error")
    warnings.warn("deprecated", stacklevel=1)


async def attend_later(query, key, value):
    """Compute the right output, but only when it is awaited."""
    return attend(query, key, value)


def mapped_file(query, key, value, size=None):
    """Return the right output in a mapped file that is deleted, and cut to a size."""
    output = attend(query, key, value)
    with tempfile.NamedTemporaryFile() as file:
        mapped = numpy.memmap(file.name, output.dtype, "w+", shape=output.shape)
        mapped[...] = output
        if size is not None:
            os.truncate(file.name, size)
    return mapped


def unaligned(query, key, value):
    """Return the right output at an odd address."""
    output = attend(query, key, value)
    memory = numpy.empty(output.nbytes + 1, "u1")[1:]
    memory[...] = numpy.frombuffer(output.tobytes(), "u1")
    return memory.view(output.dtype).reshape(output.shape)


def read_only(query, key, value):
    """Return the right output as an array that cannot be written to."""
    output = attend(query, key, value)
    output.flags.writeable = False
    return output
