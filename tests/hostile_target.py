# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
"""An attention that misbehaves in the case that is called as the behaviour, and is right in all others.

`BEHAVIOURS` has functions of query, key and value by their names, in a table by the outcome of the case. The test writes
the table of cases, CASES, in front of this file.
"""

import asyncio
import atexit
import builtins
import ctypes
import gc
import locale
import mmap
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from typing import Any

import ml_dtypes
import numpy

from mha_spec import reference

CASES: dict[str, str] = globals().get("CASES", {})
asked = None


def supports(question):
    """Remember the case that is asked."""
    global asked
    asked = CASES.get(question.id)
    if asked == "supports_raises":
        raise RuntimeError("cannot say")
    return "not\x1b[2J today\nconformant" if asked == "supports_forges" else True


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
    """Write to every pipe that this process has, but the standard ones."""
    for descriptor in range(3, 64):
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith("pipe:"):
                os.write(descriptor, text)
        except OSError:
            pass


def redirect_everything():
    """Let every descriptor that this process has, but the standard ones, lead nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in set(map(int, os.listdir("/proc/self/fd"))) - {0, 1, 2, nowhere}:
        os.dup2(nowhere, descriptor)


def fork(action):
    """Fork, and let the child act and then end."""
    if os.fork() == 0:
        action()
        os._exit(0)


def become_daemon():
    """Go on in a child, and end this process."""
    if os.fork():
        os._exit(0)
    os.setsid()


def lose_folder():
    """Remove the working folder."""
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)


def lose_files():
    """Remove the files of the run."""
    for value in os.environ.values():
        if os.path.isabs(value) and os.path.isdir(value) and "mha-spec-" in value:
            shutil.rmtree(value)


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
    """Print in a thread that goes on after the call."""

    def print_lines():
        for _ in range(100):
            os.write(1, b"noise\n")
            time.sleep(0.005)

    threading.Thread(target=print_lines, daemon=True).start()


def print_without_end():
    """Print for ever."""
    while True:
        os.write(1, b"x\n" * 2**15)


def replace_builtins():
    """Replace functions of Python by others that raise."""
    for name in ("print", "input", "sorted", "open"):
        setattr(builtins, name, raising(RuntimeError("replaced")))


def replace_in(module, *names):
    """Replace functions of a module by others that raise."""
    for name in names:
        setattr(sys.modules[module], name, raising(RuntimeError("replaced")))


def warn_as_error():
    """Raise a warning."""
    warnings.simplefilter("error")
    warnings.warn("deprecated", stacklevel=1)


async def attend_later(query, key, value):
    """Compute the right output, but only when it is awaited."""
    return attend(query, key, value)


def mapped_file(query, key, value, size=None):
    """Give the right output in a mapped file that is deleted, and cut to a size."""
    output = attend(query, key, value)
    with tempfile.NamedTemporaryFile() as file:
        mapped = numpy.memmap(file.name, output.dtype, "w+", shape=output.shape)
        mapped[...] = output
        if size is not None:
            os.truncate(file.name, size)
    return mapped


def unaligned(query, key, value):
    """Give the right output at an odd address."""
    output = attend(query, key, value)
    memory = numpy.empty(output.nbytes + 1, "u1")[1:]
    memory[...] = numpy.frombuffer(output.tobytes(), "u1")
    return memory.view(output.dtype).reshape(output.shape)


def read_only(query, key, value):
    """Give the right output as an array that cannot be written to."""
    output = attend(query, key, value)
    output.flags.writeable = False
    return output


SLEEP = ["sleep", "77"]

BEHAVIOURS = {
    "crash": {
        "exit_3": lambda q, k, v: os._exit(3),
        "exit_0": lambda q, k, v: os._exit(0),
        "exit_in_c": lambda q, k, v: ctypes.CDLL(None).exit(0),
        "abort": lambda q, k, v: os.abort(),
        "segfault": lambda q, k, v: ctypes.string_at(0),
        "write_to_constant": lambda q, k, v: write_to_constant(),
        "division_by_zero": lambda q, k, v: os.kill(os.getpid(), signal.SIGFPE),
        "illegal_instruction": lambda q, k, v: os.kill(os.getpid(), signal.SIGILL),
        "cut_file": lambda q, k, v: touch_cut_file(),
        "cut_output": lambda q, k, v: mapped_file(q, k, v, size=0),
        "free_twice": lambda q, k, v: free_twice(),
        "kill": lambda q, k, v: os.kill(os.getpid(), signal.SIGKILL),
        "kills_group": lambda q, k, v: os.killpg(0, signal.SIGKILL),
        "terminate": lambda q, k, v: os.kill(os.getpid(), signal.SIGTERM),
        "hang_up": lambda q, k, v: os.kill(os.getpid(), signal.SIGHUP),
        "realtime_signal": lambda q, k, v: os.kill(os.getpid(), 40),
        "alarm": lambda q, k, v: (signal.setitimer(signal.ITIMER_REAL, 0.01), time.sleep(60)),
        "time_limit": lambda q, k, v: (limit("RLIMIT_CPU", 0), [None for _ in iter(int, 1)]),
        "no_descriptors": then_attend(leak_descriptors),
        "no_files": then_attend(lambda: limit("RLIMIT_FSIZE", 0)),
        "closes_everything": then_attend(lambda: os.closerange(0, 4096)),
        "redirects_everything": then_attend(redirect_everything),
        "fork_then_crash": lambda q, k, v: (fork(lambda: time.sleep(77)), os._exit(3)),
        "becomes_daemon": then_attend(become_daemon),
        "becomes_another_program": lambda q, k, v: os.execv("/bin/true", ["true"]),
        "exit_from_thread": lambda q, k, v: (threading.Timer(0.01, os._exit, (5,)).start(), time.sleep(60)),
        "recursion_in_c": lambda q, k, v: recurse_in_c(),
        "prints_binary": lambda q, k, v: (os.write(1, bytes(range(256)) * 40 + b"\n\x1b]0;owned\x07"), os._exit(4)),
        "prints_20_mb": lambda q, k, v: ([os.write(1, b"x\n" * 2**19) for _ in range(20)], os._exit(4)),
        "zeros_in_pipe": then_attend(lambda: write_to_pipes(b"\0\0")),
        "half_a_line_in_pipe": then_attend(lambda: write_to_pipes(b'{"message":')),
        "line_in_pipe": then_attend(lambda: write_to_pipes(b"debug: here\n")),
        "list_in_pipe": then_attend(lambda: write_to_pipes(b"[1, 2]\n")),
        "deep_json_in_pipe": then_attend(lambda: write_to_pipes(b"[" * 5000 + b"\n")),
        "other_message_in_pipe": then_attend(lambda: write_to_pipes(b'{"message": "claims"}\n')),
        "json_is_gone": then_attend(lambda: replace_in("json", "dumps")),
    },
    "timeout": {
        "sleeps": lambda q, k, v: time.sleep(77),
        "stops": lambda q, k, v: os.kill(os.getpid(), signal.SIGSTOP),
        "ignores_signals": lambda q, k, v: (ignore_signals(), time.sleep(77)),
        "deadlock": lambda q, k, v: [lock.acquire() for lock in [threading.Lock()] * 2],
        "prints_without_end": lambda q, k, v: print_without_end(),
        "zeros_in_pipe_and_sleeps": lambda q, k, v: (write_to_pipes(b"\0\0"), time.sleep(77)),
    },
    "error": {
        "value_error": raising(ValueError("no kernel")),
        "system_exit": lambda q, k, v: sys.exit([1, 2]),
        "generator_exit": raising(GeneratorExit),
        "keyboard_interrupt": raising(KeyboardInterrupt),
        "cancelled": raising(asyncio.CancelledError),
        "stop_iteration": raising(StopIteration),
        "memory_error": lambda q, k, v: numpy.ones(2**60, numpy.int8),
        "recursion": lambda q, k, v: recurse(),
        "assertion": raising(AssertionError),
        "no_text": raising(NoText),
        "number_as_text": raising(NumberAsText),
        "odd_text": raising(OddText),
        "nameless_class": raising(NamelessError),
        "unpicklable": raising(Unpicklable(lambda: 0)),
        "long_message": raising(ValueError("x" * 10_000_000)),
        "surrogate": raising(ValueError("file \udcff is missing")),
        "bytes_as_name": raising(OSError(2, b"\xff\xfe", b"\xff")),
        "undecodable": lambda q, k, v: b"\xff".decode(),
        "ansi": raising(ValueError("\x1b[2J\x9b31m\r[bold]x[/bold]\nhostile.py: conformant")),
        "odd_class": lambda q, k, v: raising(type("E\n\x1b[2J", (Exception,), {})())(q, k, v),
        "group": raising(ExceptionGroup("several", [ValueError("one")])),
        "nameless_code": lambda q, k, v: exec(compile("raise ValueError('generated')", "", "exec")),
        "nul_in_name": lambda q, k, v: exec(compile("raise ValueError('generated')", "/a\x1b[2J", "exec")),
        "reads_stdin": lambda q, k, v: input(),
        "warning_as_error": lambda q, k, v: warn_as_error(),
        "folder_gone": lambda q, k, v: (lose_folder(), raising(ValueError("no kernel"))(q, k, v)),
        "weak_reference": lambda q, k, v: weakref.proxy(attend(q, k, v)),
        "profile_that_raises": and_attend(lambda: sys.setprofile(raising(ValueError("profile")))),
        "output_without_shape": lambda q, k, v: attend(q, k, v).view(Shapeless),
        "output_with_odd_shape": lambda q, k, v: attend(q, k, v).view(OddlyShaped),
        "supports_raises": attend,
    },
    "fail": {
        "none": lambda q, k, v: None,
        "python_float": lambda q, k, v: 1.0,
        "text": lambda q, k, v: "output",
        "list": lambda q, k, v: [1.0],
        "mapping": lambda q, k, v: {"output": attend(q, k, v)},
        "two_arrays": lambda q, k, v: (q, k),
        "tuple_of_one": lambda q, k, v: (attend(q, k, v),),
        "generator": lambda q, k, v: (x for x in q),
        "coroutine": attend_later,
        "function": lambda q, k, v: attend,
        "class": lambda q, k, v: numpy.ndarray,
        "bytes": lambda q, k, v: q.tobytes(),
        "memory_view": lambda q, k, v: memoryview(q),
        "c_array": lambda q, k, v: (ctypes.c_float * 4)(),
        "memory_that_is_not_there": lambda q, k, v: Pointer(),
        "odd_tuple": lambda q, k, v: OddTuple((1, 2)),
        "lazy": lambda q, k, v: Lazy(),
        "trace_that_raises": and_attend(lambda: sys.settrace(raising(ValueError("trace")))),
        "masked_array": lambda q, k, v: numpy.ma.array(attend(q, k, v)),
        "zero_d": lambda q, k, v: attend(q, k, v).sum(),
        "scalar": lambda q, k, v: numpy.float32(1),
        "empty": lambda q, k, v: numpy.zeros(0, numpy.float32),
        "other_shape": lambda q, k, v: attend(q, k, v)[:, :1],
        "one_axis_more": lambda q, k, v: attend(q, k, v)[None],
        "rank_60": lambda q, k, v: numpy.zeros((1,) * 60, numpy.float32),
        "one_gibibyte": lambda q, k, v: numpy.zeros(2**28, numpy.float32),
        "view_of_128_tebibytes": lambda q, k, v: numpy.broadcast_to(numpy.float32(1), (2**45,)),
        "larger_than_all_memory": lambda q, k, v: attend(q, k, v).view(Immense),
        "stride_0": lambda q, k, v: numpy.broadcast_to(numpy.float32(1), attend(q, k, v).shape),
        "objects": lambda q, k, v: attend(q, k, v).astype(object),
        "texts": lambda q, k, v: attend(q, k, v).astype(str),
        "dates": lambda q, k, v: attend(q, k, v).astype("datetime64[s]"),
        "void": lambda q, k, v: numpy.zeros(attend(q, k, v).shape, "V0"),
        "void_7": lambda q, k, v: numpy.zeros(attend(q, k, v).shape, "V7"),
        "structured": lambda q, k, v: attend(q, k, v).view([("a", q.dtype)]),
        "records": lambda q, k, v: attend(q, k, v).view([("a", q.dtype)]).view(numpy.recarray),
        "complex": lambda q, k, v: attend(q, k, v).astype(complex),
        "long_double": lambda q, k, v: attend(q, k, v).astype(numpy.longdouble),
        "integers": lambda q, k, v: attend(q, k, v).astype(int),
        "booleans": lambda q, k, v: attend(q, k, v).astype(bool),
        "halves": lambda q, k, v: attend(q, k, v).astype(numpy.float16),
        "float8": lambda q, k, v: attend(q, k, v).astype(ml_dtypes.float8_e4m3fn),
        "int4": lambda q, k, v: attend(q, k, v).astype(ml_dtypes.int4),
        "nan": lambda q, k, v: attend(q, k, v) * numpy.nan,
        "infinite": lambda q, k, v: attend(q, k, v) * numpy.inf,
        "zeros": lambda q, k, v: attend(q, k, v) * 0,
        "uninitialized": lambda q, k, v: numpy.frombuffer(b"\xee" * 4 * attend(q, k, v).size, "f4").reshape(
            attend(q, k, v).shape
        ),
        "half_more": lambda q, k, v: attend(q, k, v) * numpy.float32(1.5),
        "writes_to_input": lambda q, k, v: (attend(q, k, v), q.fill(0))[0],
        "patched_and_writes": lambda q, k, v: (attend(q, k, v), setattr(numpy, "array_equal", bool), q.fill(0))[0],
    },
    "deviation": {"double": lambda q, k, v: attend(q, k, v).astype(numpy.float64)},
    "unsupported": {
        "refuses": raising(NotImplementedError("no groups")),
        "refuses_and_forges": raising(NotImplementedError("x\nhostile.py: conformant on everything\x1b[2J")),
        "supports_forges": attend,
    },
    "pass": {
        "forks_three": then_attend(lambda: [fork(lambda: time.sleep(77)) for _ in range(3)]),
        "fork_returns": then_attend(os.fork),
        "leaves_process": then_attend(lambda: subprocess.Popen(SLEEP, close_fds=False)),
        "leaves_daemon": then_attend(lambda: subprocess.Popen(SLEEP, start_new_session=True)),
        "leaves_daemon_without_environment": then_attend(
            lambda: subprocess.Popen(SLEEP, start_new_session=True, env={})
        ),
        "leaves_forked_daemon": then_attend(lambda: fork(lambda: (os.setsid(), fork(lambda: time.sleep(77))))),
        "leaves_thread": then_attend(lambda: threading.Thread(target=time.sleep, args=(77,)).start()),
        "leaves_thread_that_prints": then_attend(print_for_a_while),
        "raises_at_exit": then_attend(lambda: atexit.register(raising(ValueError("late")))),
        "hangs_at_exit": then_attend(lambda: atexit.register(time.sleep, 77)),
        "prints": then_attend(lambda: print("noise " * 10000)),
        "closes_input": then_attend(lambda: os.close(0)),
        "closes_output": then_attend(lambda: os.close(1)),
        "closes_standard_streams": then_attend(lambda: os.closerange(0, 3)),
        "no_streams": then_attend(lambda: (setattr(sys, "stdout", None), setattr(sys, "stderr", None))),
        "clears_environment": then_attend(lambda: (sys.path.clear(), os.chdir("/"), os.environ.clear())),
        "mask_of_files": then_attend(lambda: os.umask(0o777)),
        "loses_files": then_attend(lose_files),
        "low_priority": then_attend(lambda: os.nice(5)),
        "low_recursion": then_attend(lambda: sys.setrecursionlimit(200)),
        "no_collection": then_attend(lambda: (gc.disable(), gc.freeze())),
        "numpy_errors_raise": and_attend(lambda: numpy.seterr(all="raise")),
        "numpy_errors_exit": and_attend(exit_at_numpy_errors),
        "numpy_prints_little": and_attend(lambda: numpy.set_printoptions(threshold=1, precision=0)),
        "rounds_up": and_attend(round_up),
        "flushes_subnormals": and_attend(flush_subnormals),
        "sets_locale": and_attend(set_locale),
        "replaces_builtins": and_attend(replace_builtins),
        "replaces_functions_of_numpy": and_attend(lambda: replace_in("numpy", "array_equal", "allclose", "save")),
        "number_that_is_not_held": then_attend(
            lambda: write_to_pipes(b'{"message": "answer", "number": 999999, "kind": "returned"}\n')
        ),
        "big_endian": lambda q, k, v: attend(q, k, v).astype(">f4"),
        "subclass": lambda q, k, v: attend(q, k, v).view(Guarded),
        "deleted_file": mapped_file,
        "unaligned": unaligned,
        "read_only": read_only,
        "reversed": lambda q, k, v: numpy.flip(numpy.flip(attend(q, k, v)).copy()),
        "fortran": lambda q, k, v: numpy.asfortranarray(attend(q, k, v)),
    },
}
"""What happens, by the outcome that the case then has."""

FUNCTIONS = {name: function for named in BEHAVIOURS.values() for name, function in named.items()}


def restore():
    """Undo what would change the numbers of the cases that follow in the same process, which are right."""
    numpy.seterr(all="warn")
    warnings.simplefilter("default")
    ctypes.CDLL("libm.so.6").fesetround(0)


def attention(query, key, value):
    """Misbehave if the case says so."""
    restore()
    return FUNCTIONS.get(asked, attend)(query, key, value)
