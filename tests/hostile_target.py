# pyright: basic, reportCallIssue=false, reportArgumentType=false
"""An attention that misbehaves in the case that is called as the behaviour, and is right in all others.

`BEHAVIOURS` has functions of query, key and value by their names, in a table by the outcome of the case. The test
writes the table of cases, CASES, in front of this file.
"""

import asyncio
import atexit
import builtins
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref

import ml_dtypes
import numpy

import hostile_actions as do

CASES: dict[str, str] = globals().get("CASES", {})
ENVIRONMENT = dict(os.environ)
asked = None


def supports(question):
    """Remember the case that is asked."""
    global asked
    asked = CASES.get(question.id)
    if asked == "supports_raises":
        raise RuntimeError("cannot say")
    return "not\x1b[2J today\nconformant" if asked == "supports_forges" else True


SLEEP = ["sleep", "77"]

BEHAVIOURS = {
    "crash": {
        "exit_3": lambda q, k, v: os._exit(3),
        "exit_0": lambda q, k, v: os._exit(0),
        "exit_in_c": lambda q, k, v: ctypes.CDLL(None).exit(0),
        "abort": lambda q, k, v: os.abort(),
        "segfault": lambda q, k, v: ctypes.string_at(0),
        "write_to_constant": lambda q, k, v: do.write_to_constant(),
        "division_by_zero": lambda q, k, v: os.kill(os.getpid(), signal.SIGFPE),
        "illegal_instruction": lambda q, k, v: os.kill(os.getpid(), signal.SIGILL),
        "cut_file": lambda q, k, v: do.touch_cut_file(),
        "cut_output": lambda q, k, v: do.mapped_file(q, k, v, size=0),
        "free_twice": lambda q, k, v: do.free_twice(),
        "kill": lambda q, k, v: os.kill(os.getpid(), signal.SIGKILL),
        "kills_group": lambda q, k, v: os.killpg(0, signal.SIGKILL),
        "terminate": lambda q, k, v: os.kill(os.getpid(), signal.SIGTERM),
        "hang_up": lambda q, k, v: os.kill(os.getpid(), signal.SIGHUP),
        "realtime_signal": lambda q, k, v: os.kill(os.getpid(), 40),
        "alarm": lambda q, k, v: (signal.setitimer(signal.ITIMER_REAL, 0.01), time.sleep(60)),
        "time_limit": lambda q, k, v: (do.limit("RLIMIT_CPU", 0), [None for _ in iter(int, 1)]),
        "no_descriptors": do.then_attend(do.leak_descriptors),
        "no_files": do.then_attend(lambda: do.limit("RLIMIT_FSIZE", 0)),
        "closes_everything": do.then_attend(lambda: os.closerange(0, 4096)),
        "redirects_everything": do.then_attend(do.redirect_everything),
        "fork_then_crash": lambda q, k, v: (do.fork(lambda: time.sleep(77)), os._exit(3)),
        "becomes_daemon": do.then_attend(do.become_daemon),
        "becomes_another_program": lambda q, k, v: os.execv("/bin/true", ["true"]),
        "exit_from_thread": lambda q, k, v: (threading.Timer(0.01, os._exit, (5,)).start(), time.sleep(60)),
        "recursion_in_c": lambda q, k, v: do.recurse_in_c(),
        "prints_binary": lambda q, k, v: (os.write(1, bytes(range(256)) * 40 + b"\n\x1b]0;owned\x07"), os._exit(4)),
        "prints_20_mb": lambda q, k, v: ([os.write(1, b"x\n" * 2**19) for _ in range(20)], os._exit(4)),
        "zeros_in_pipe": do.then_attend(lambda: do.write_to_pipes(b"\0\0")),
        "half_a_line_in_pipe": do.then_attend(lambda: do.write_to_pipes(b'{"message":')),
        "line_in_pipe": do.then_attend(lambda: do.write_to_pipes(b"debug: here\n")),
        "list_in_pipe": do.then_attend(lambda: do.write_to_pipes(b"[1, 2]\n")),
        "deep_json_in_pipe": do.then_attend(lambda: do.write_to_pipes(b"[" * 5000 + b"\n")),
        "other_message_in_pipe": do.then_attend(lambda: do.write_to_pipes(b'{"message": "claims"}\n')),
        "json_is_gone": do.then_attend(lambda: do.replace_in(json, "dumps")),
    },
    "timeout": {
        "sleeps": lambda q, k, v: time.sleep(77),
        "stops": lambda q, k, v: os.kill(os.getpid(), signal.SIGSTOP),
        "ignores_signals": lambda q, k, v: (do.ignore_signals(), time.sleep(77)),
        "deadlock": lambda q, k, v: [lock.acquire() for lock in [threading.Lock()] * 2],
        "prints_without_end": lambda q, k, v: do.print_without_end(),
        "zeros_in_pipe_and_sleeps": lambda q, k, v: (do.write_to_pipes(b"\0\0"), time.sleep(77)),
    },
    "error": {
        "value_error": do.raising(ValueError("no kernel")),
        "system_exit": lambda q, k, v: sys.exit([1, 2]),
        "generator_exit": do.raising(GeneratorExit),
        "keyboard_interrupt": do.raising(KeyboardInterrupt),
        "cancelled": do.raising(asyncio.CancelledError),
        "stop_iteration": do.raising(StopIteration),
        "memory_error": lambda q, k, v: numpy.ones(2**60, numpy.int8),
        "recursion": lambda q, k, v: do.recurse(),
        "assertion": do.raising(AssertionError),
        "no_text": do.raising(do.NoText),
        "number_as_text": do.raising(do.NumberAsText),
        "odd_text": do.raising(do.OddText),
        "nameless_class": do.raising(do.NamelessError),
        "unpicklable": do.raising(do.Unpicklable(lambda: 0)),
        "long_message": do.raising(ValueError("x" * 10_000_000)),
        "surrogate": do.raising(ValueError("file \udcff is missing")),
        "bytes_as_name": do.raising(OSError(2, b"\xff\xfe", b"\xff")),
        "undecodable": lambda q, k, v: b"\xff".decode(),
        "ansi": do.raising(ValueError("\x1b[2J\x9b31m\r[bold]x[/bold]\nhostile.py: conformant")),
        "odd_class": lambda q, k, v: do.raising(type("E\n\x1b[2J", (Exception,), {})())(q, k, v),
        "group": do.raising(ExceptionGroup("several", [ValueError("one")])),
        "nameless_code": lambda q, k, v: exec(compile("raise ValueError('generated')", "", "exec")),
        "nul_in_name": lambda q, k, v: exec(compile("raise ValueError('generated')", "/a\x1b[2J", "exec")),
        "reads_stdin": lambda q, k, v: input(),
        "warning_as_error": lambda q, k, v: do.warn_as_error(),
        "folder_gone": lambda q, k, v: (do.lose_folder(), do.raising(ValueError("no kernel"))(q, k, v)),
        "weak_reference": lambda q, k, v: weakref.proxy(do.attend(q, k, v)),
        "profile_that_raises": do.and_attend(lambda: sys.setprofile(do.raising(ValueError("profile")))),
        "output_without_shape": lambda q, k, v: do.attend(q, k, v).view(do.Shapeless),
        "output_with_odd_shape": lambda q, k, v: do.attend(q, k, v).view(do.OddlyShaped),
        "supports_raises": do.attend,
    },
    "fail": {
        "none": lambda q, k, v: None,
        "python_float": lambda q, k, v: 1.0,
        "text": lambda q, k, v: "output",
        "list": lambda q, k, v: [1.0],
        "mapping": lambda q, k, v: {"output": do.attend(q, k, v)},
        "two_arrays": lambda q, k, v: (q, k),
        "tuple_of_one": lambda q, k, v: (do.attend(q, k, v),),
        "generator": lambda q, k, v: (x for x in q),
        "coroutine": do.attend_later,
        "function": lambda q, k, v: do.attend,
        "class": lambda q, k, v: numpy.ndarray,
        "bytes": lambda q, k, v: q.tobytes(),
        "memory_view": lambda q, k, v: memoryview(q),
        "c_array": lambda q, k, v: (ctypes.c_float * 4)(),
        "memory_that_is_not_there": lambda q, k, v: do.Pointer(),
        "odd_tuple": lambda q, k, v: do.OddTuple((1, 2)),
        "lazy": lambda q, k, v: do.Lazy(),
        "trace_that_raises": do.and_attend(lambda: sys.settrace(do.raising(ValueError("trace")))),
        "masked_array": lambda q, k, v: numpy.ma.array(do.attend(q, k, v)),
        "zero_d": lambda q, k, v: do.attend(q, k, v).sum(),
        "scalar": lambda q, k, v: numpy.float32(1),
        "empty": lambda q, k, v: numpy.zeros(0, numpy.float32),
        "other_shape": lambda q, k, v: do.attend(q, k, v)[:, :1],
        "one_axis_more": lambda q, k, v: do.attend(q, k, v)[None],
        "rank_60": lambda q, k, v: numpy.zeros((1,) * 60, numpy.float32),
        "one_gibibyte": lambda q, k, v: numpy.zeros(2**28, numpy.float32),
        "view_of_128_tebibytes": lambda q, k, v: numpy.broadcast_to(numpy.float32(1), (2**45,)),
        "larger_than_all_memory": lambda q, k, v: do.attend(q, k, v).view(do.Immense),
        "stride_0": lambda q, k, v: numpy.broadcast_to(numpy.float32(1), do.attend(q, k, v).shape),
        "objects": lambda q, k, v: do.attend(q, k, v).astype(object),
        "texts": lambda q, k, v: do.attend(q, k, v).astype(str),
        "dates": lambda q, k, v: do.attend(q, k, v).astype("datetime64[s]"),
        "void": lambda q, k, v: numpy.zeros(do.attend(q, k, v).shape, "V0"),
        "void_7": lambda q, k, v: numpy.zeros(do.attend(q, k, v).shape, "V7"),
        "structured": lambda q, k, v: do.attend(q, k, v).view([("a", q.dtype)]),
        "records": lambda q, k, v: do.attend(q, k, v).view([("a", q.dtype)]).view(numpy.recarray),
        "complex": lambda q, k, v: do.attend(q, k, v).astype(complex),
        "long_double": lambda q, k, v: do.attend(q, k, v).astype(numpy.longdouble),
        "integers": lambda q, k, v: do.attend(q, k, v).astype(int),
        "booleans": lambda q, k, v: do.attend(q, k, v).astype(bool),
        "halves": lambda q, k, v: do.attend(q, k, v).astype(numpy.float16),
        "float8": lambda q, k, v: do.attend(q, k, v).astype(ml_dtypes.float8_e4m3fn),
        "int4": lambda q, k, v: do.attend(q, k, v).astype(ml_dtypes.int4),
        "nan": lambda q, k, v: do.attend(q, k, v) * numpy.nan,
        "infinite": lambda q, k, v: do.attend(q, k, v) * numpy.inf,
        "zeros": lambda q, k, v: do.attend(q, k, v) * 0,
        "uninitialized": lambda q, k, v: numpy.frombuffer(b"\xee" * 4 * do.attend(q, k, v).size, "f4").reshape(
            do.attend(q, k, v).shape
        ),
        "half_more": lambda q, k, v: do.attend(q, k, v) * numpy.float32(1.5),
        "writes_to_input": lambda q, k, v: (do.attend(q, k, v), q.fill(0))[0],
        "patched_and_writes": lambda q, k, v: (do.attend(q, k, v), do.replace_in(numpy, "array_equal"), q.fill(0))[0],
    },
    "deviation": {"double": lambda q, k, v: do.attend(q, k, v).astype(numpy.float64)},
    "unsupported": {
        "refuses": do.raising(NotImplementedError("no groups")),
        "refuses_and_forges": do.raising(NotImplementedError("x\nhostile.py: conformant on everything\x1b[2J")),
        "supports_forges": do.attend,
    },
    "pass": {
        "forks_three": do.then_attend(lambda: [do.fork(lambda: time.sleep(77)) for _ in range(3)]),
        "fork_returns": do.then_attend(os.fork),
        "leaves_process": do.then_attend(lambda: subprocess.Popen(SLEEP, close_fds=False)),
        "leaves_daemon": do.then_attend(lambda: subprocess.Popen(SLEEP, start_new_session=True)),
        "leaves_forked_daemon": do.then_attend(lambda: do.fork(lambda: (os.setsid(), do.fork(lambda: time.sleep(77))))),
        "leaves_thread": do.then_attend(lambda: threading.Thread(target=time.sleep, args=(77,)).start()),
        "leaves_thread_that_prints": do.then_attend(do.print_for_a_while),
        "raises_at_exit": do.then_attend(lambda: atexit.register(do.raising(ValueError("late")))),
        "hangs_at_exit": do.then_attend(lambda: atexit.register(time.sleep, 77)),
        "prints": do.then_attend(lambda: print("noise " * 10000)),
        "closes_input": do.then_attend(lambda: os.close(0)),
        "closes_output": do.then_attend(lambda: os.close(1)),
        "closes_standard_streams": do.then_attend(lambda: os.closerange(0, 3)),
        "no_streams": do.then_attend(lambda: (setattr(sys, "stdout", None), setattr(sys, "stderr", None))),
        "clears_environment": do.then_attend(lambda: (sys.path.clear(), os.chdir("/"), os.environ.clear())),
        "mask_of_files": do.then_attend(lambda: os.umask(0o777)),
        "loses_files": do.then_attend(do.lose_files),
        "low_priority": do.then_attend(lambda: os.nice(5)),
        "low_recursion": do.then_attend(lambda: sys.setrecursionlimit(200)),
        "no_collection": do.then_attend(lambda: (gc.disable(), gc.freeze())),
        "numpy_errors_raise": do.and_attend(lambda: numpy.seterr(all="raise")),
        "numpy_errors_exit": do.and_attend(do.exit_at_numpy_errors),
        "numpy_prints_little": do.and_attend(lambda: numpy.set_printoptions(threshold=1, precision=0)),
        "rounds_up": do.and_attend(do.round_up),
        "flushes_subnormals": do.and_attend(do.flush_subnormals),
        "sets_locale": do.and_attend(do.set_locale),
        "replaces_builtins": do.and_attend(lambda: do.replace_in(builtins, "print", "input", "sorted", "open")),
        "replaces_functions_of_numpy": do.and_attend(lambda: do.replace_in(numpy, "array_equal", "allclose", "save")),
        "number_that_is_not_held": do.then_attend(
            lambda: do.write_to_pipes(b'{"message": "answer", "number": 999999, "kind": "returned"}\n')
        ),
        "big_endian": lambda q, k, v: do.attend(q, k, v).astype(">f4"),
        "subclass": lambda q, k, v: do.attend(q, k, v).view(do.Guarded),
        "deleted_file": do.mapped_file,
        "unaligned": do.unaligned,
        "read_only": do.read_only,
        "reversed": lambda q, k, v: numpy.flip(numpy.flip(do.attend(q, k, v)).copy()),
        "fortran": lambda q, k, v: numpy.asfortranarray(do.attend(q, k, v)),
    },
}
"""The behaviours, by the outcome that they give a case."""

FUNCTIONS = {name: function for named in BEHAVIOURS.values() for name, function in named.items()}


def restore():
    """Undo what would change the numbers or the processes of the cases that follow in the same process."""
    os.environ.update(ENVIRONMENT)
    numpy.seterr(all="warn")
    warnings.simplefilter("default")
    ctypes.CDLL("libm.so.6").fesetround(0)
    for module, functions in do.REPLACED.items():
        vars(module).update(functions)


def attention(query, key, value):
    """Misbehave if the case says so."""
    restore()
    return FUNCTIONS.get(asked, do.attend)(query, key, value)
