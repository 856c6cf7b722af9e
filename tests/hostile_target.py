# pyright: basic, reportCallIssue=false, reportArgumentType=false
"""An attention that misbehaves in the case that is called as the behaviour, and is right in all others.

`BEHAVIOURS` is a table of statements by name. The test writes the table of cases, CASES, in front of this file.
"""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

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


class Lazy:
    """An object with a dtype that fails when it is read."""

    dtype = numpy.dtype("float32")

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("the graph is gone")


def write_to_pipes(text):
    """Write to every pipe that this process has, but the standard ones."""
    for descriptor in range(3, 64):
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith("pipe:"):
                os.write(descriptor, text)
        except OSError:
            pass


def fork(child):
    """Fork, and let the child do something and then end."""
    if os.fork() == 0:
        child()
        os._exit(0)


def lose_folder():
    """Remove the working folder."""
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)


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


def pulled_up(error):
    """Raise an error."""
    raise error


SLEEP = ["sleep", "77"]

BEHAVIOURS = {
    "crash": {
        "exit_3": lambda q, k, v: os._exit(3),
        "exit_0": lambda q, k, v: os._exit(0),
        "abort": lambda q, k, v: os.abort(),
        "segfault": lambda q, k, v: ctypes.string_at(0),
        "kill": lambda q, k, v: os.kill(os.getpid(), signal.SIGKILL),
        "terminate": lambda q, k, v: os.kill(os.getpid(), signal.SIGTERM),
        "hang_up": lambda q, k, v: os.kill(os.getpid(), signal.SIGHUP),
        "realtime_signal": lambda q, k, v: os.kill(os.getpid(), 40),
        "alarm": lambda q, k, v: (signal.setitimer(signal.ITIMER_REAL, 0.01), time.sleep(60)),
        "closes_everything": lambda q, k, v: os.closerange(0, 4096),
        "fork_then_crash": lambda q, k, v: (fork(lambda: time.sleep(77)), os._exit(3)),
        "becomes_another_program": lambda q, k, v: os.execv("/bin/true", ["true"]),
        "exit_from_thread": lambda q, k, v: (threading.Timer(0.01, os._exit, (5,)).start(), time.sleep(60)),
        "recursion_in_c": lambda q, k, v: recurse_in_c(),
        "prints_binary": lambda q, k, v: (os.write(1, bytes(range(256)) * 40 + b"\n\x1b]0;owned\x07"), os._exit(4)),
        "prints_20_mb": lambda q, k, v: ([os.write(1, b"x\n" * 2**19) for _ in range(20)], os._exit(4)),
        "zeros_in_pipe": lambda q, k, v: write_to_pipes(b"\0\0"),
        "half_a_line_in_pipe": lambda q, k, v: write_to_pipes(b'{"message":'),
        "line_in_pipe": lambda q, k, v: write_to_pipes(b"debug: here\n"),
        "list_in_pipe": lambda q, k, v: write_to_pipes(b"[1, 2]\n"),
        "deep_json_in_pipe": lambda q, k, v: write_to_pipes(b"[" * 5000 + b"\n"),
        "other_message_in_pipe": lambda q, k, v: write_to_pipes(b'{"message": "claims"}\n'),
        "json_is_gone": lambda q, k, v: setattr(sys.modules["json"], "dumps", None),
    },
    "timeout": {
        "sleeps": lambda q, k, v: time.sleep(77),
        "stops": lambda q, k, v: os.kill(os.getpid(), signal.SIGSTOP),
        "ignores_signals": lambda q, k, v: (ignore_signals(), time.sleep(77)),
        "deadlock": lambda q, k, v: [threading.Lock()] * 2 and [lock.acquire() for lock in [threading.Lock()] * 2],
        "prints_without_end": lambda q, k, v: [os.write(1, b"x\n" * 2**15) for _ in iter(int, 1)],
    },
    "error": {
        "value_error": lambda q, k, v: pulled_up(ValueError("no kernel")),
        "system_exit": lambda q, k, v: sys.exit([1, 2]),
        "generator_exit": lambda q, k, v: pulled_up(GeneratorExit()),
        "keyboard_interrupt": lambda q, k, v: pulled_up(KeyboardInterrupt()),
        "stop_iteration": lambda q, k, v: pulled_up(StopIteration()),
        "memory_error": lambda q, k, v: numpy.ones(2**60, numpy.int8),
        "recursion": lambda q, k, v: recurse(),
        "no_text": lambda q, k, v: pulled_up(NoText()),
        "number_as_text": lambda q, k, v: pulled_up(NumberAsText()),
        "unpicklable": lambda q, k, v: pulled_up(Unpicklable(lambda: 0)),
        "long_message": lambda q, k, v: pulled_up(ValueError("x" * 10_000_000)),
        "surrogate": lambda q, k, v: pulled_up(ValueError("file \udcff is missing")),
        "ansi": lambda q, k, v: pulled_up(ValueError("\x1b[2J\x9b31m\r[bold]x[/bold]\nhostile.py: conformant")),
        "odd_class": lambda q, k, v: pulled_up(type("E\n\x1b[2J", (Exception,), {})()),
        "group": lambda q, k, v: pulled_up(ExceptionGroup("several", [ValueError("one")])),
        "nameless_code": lambda q, k, v: exec(compile("raise ValueError('generated')", "", "exec")),
        "nul_in_name": lambda q, k, v: exec(compile("raise ValueError('generated')", "/a\x1b[2J", "exec")),
        "reads_stdin": lambda q, k, v: input(),
        "folder_gone": lambda q, k, v: (lose_folder(), pulled_up(ValueError("no kernel"))),
        "supports_raises": lambda q, k, v: None,
    },
    "fail": {
        "none": lambda q, k, v: None,
        "python_float": lambda q, k, v: 1.0,
        "text": lambda q, k, v: "output",
        "list": lambda q, k, v: [1.0],
        "two_arrays": lambda q, k, v: (q, k),
        "generator": lambda q, k, v: (x for x in q),
        "bytes": lambda q, k, v: q.tobytes(),
        "memory_view": lambda q, k, v: memoryview(q),
        "odd_tuple": lambda q, k, v: OddTuple((1, 2)),
        "lazy": lambda q, k, v: Lazy(),
        "masked_array": lambda q, k, v: numpy.ma.array(right(q, k, v)),
        "zero_d": lambda q, k, v: right(q, k, v).sum(),
        "other_shape": lambda q, k, v: right(q, k, v)[:, :1],
        "rank_60": lambda q, k, v: numpy.zeros((1,) * 60, numpy.float32),
        "one_gibibyte": lambda q, k, v: numpy.zeros(2**28, numpy.float32),
        "view_of_128_tebibytes": lambda q, k, v: numpy.broadcast_to(numpy.float32(1), (2**45,)),
        "objects": lambda q, k, v: right(q, k, v).astype(object),
        "texts": lambda q, k, v: right(q, k, v).astype(str),
        "dates": lambda q, k, v: right(q, k, v).astype("datetime64[s]"),
        "void": lambda q, k, v: numpy.zeros(right(q, k, v).shape, "V0"),
        "void_7": lambda q, k, v: numpy.zeros(right(q, k, v).shape, "V7"),
        "structured": lambda q, k, v: right(q, k, v).view([("a", q.dtype)]),
        "complex": lambda q, k, v: right(q, k, v).astype(complex),
        "long_double": lambda q, k, v: right(q, k, v).astype(numpy.longdouble),
        "integers": lambda q, k, v: right(q, k, v).astype(int),
        "booleans": lambda q, k, v: right(q, k, v).astype(bool),
        "halves": lambda q, k, v: right(q, k, v).astype(numpy.float16),
        "nan": lambda q, k, v: right(q, k, v) * numpy.nan,
        "zeros": lambda q, k, v: right(q, k, v) * 0,
        "half_more": lambda q, k, v: right(q, k, v) * numpy.float32(1.5),
        "writes_to_input": lambda q, k, v: (right(q, k, v), q.fill(0))[0],
        "patched_and_writes": lambda q, k, v: (right(q, k, v), setattr(numpy, "array_equal", bool), q.fill(0))[0],
    },
    "deviation": {"double": lambda q, k, v: right(q, k, v).astype(numpy.float64)},
    "unsupported": {
        "refuses": lambda q, k, v: pulled_up(NotImplementedError("no groups")),
        "refuses_and_forges": lambda q, k, v: pulled_up(NotImplementedError("x\nhostile.py: conformant on everything\x1b[2J")),
        "supports_forges": lambda q, k, v: None,
    },
    "pass": {
        "forks_three": lambda q, k, v: ([fork(lambda: time.sleep(77)) for _ in range(3)], right(q, k, v))[1],
        "fork_returns": lambda q, k, v: (os.fork(), right(q, k, v))[1],
        "leaves_process": lambda q, k, v: (subprocess.Popen(SLEEP, close_fds=False), right(q, k, v))[1],
        "leaves_daemon": lambda q, k, v: (subprocess.Popen(SLEEP, start_new_session=True), right(q, k, v))[1],
        "leaves_forked_daemon": lambda q, k, v: (fork(lambda: (os.setsid(), time.sleep(77))), right(q, k, v))[1],
        "leaves_thread": lambda q, k, v: (threading.Thread(target=time.sleep, args=(77,)).start(), right(q, k, v))[1],
        "prints": lambda q, k, v: (print("noise " * 10000), right(q, k, v))[1],
        "closes_standard_streams": lambda q, k, v: (os.closerange(0, 2), right(q, k, v))[1],
        "no_streams": lambda q, k, v: (setattr(sys, "stdout", None), setattr(sys, "stderr", None), right(q, k, v))[2],
        "clears_environment": lambda q, k, v: (sys.path.clear(), os.chdir("/"), os.environ.clear(), right(q, k, v))[3],
        "mask_of_files": lambda q, k, v: (os.umask(0o777), right(q, k, v))[1],
        "low_recursion": lambda q, k, v: (sys.setrecursionlimit(200), right(q, k, v))[1],
        "number_that_is_not_held": lambda q, k, v: (
            write_to_pipes(b'{"message": "answer", "number": 999999, "kind": "returned"}\n'),
            right(q, k, v),
        )[1],
        "big_endian": lambda q, k, v: right(q, k, v).astype(">f4"),
        "subclass": lambda q, k, v: right(q, k, v).view(Guarded),
        "reversed": lambda q, k, v: numpy.flip(numpy.flip(right(q, k, v)).copy()),
        "fortran": lambda q, k, v: numpy.asfortranarray(right(q, k, v)),
    },
}  # fmt: skip
"""What happens, by the outcome that the case then has."""

FUNCTIONS = {name: function for named in BEHAVIOURS.values() for name, function in named.items()}


def right(query, key, value):
    """Give the right answer."""
    return reference.attention(query, key, value)


def attention(query, key, value):
    """Misbehave if the case says so."""
    if asked in FUNCTIONS:
        result = FUNCTIONS[asked](query, key, value)
        return right(query, key, value) if asked in BEHAVIOURS["crash"] else result
    return right(query, key, value)
