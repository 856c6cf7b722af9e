"""Processes under gloo, which the targets of this folder share: what each rank calls, and what it holds.

The process of the target is rank 0, and its first call starts the others, which load the same file and read the calls
from their standard input. They end with it.
"""

from __future__ import annotations

import inspect
import io
import os
import pickle
import runpy
import subprocess
import sys
from datetime import timedelta

import numpy
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from mha_spec.errors import MhaSpecError

RANKS = int(os.environ.get("MHA_RING_RANKS", "4"))
START, TIMEOUT = timedelta(minutes=5), timedelta(minutes=1)
"""The time in which all ranks must be ready, and that in which a rank must answer another one."""

REFUSALS = (MhaSpecError, NotImplementedError)
"""The errors that all ranks raise before they send anything."""

SERVE = "import sys, processes; processes.serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
"""The program of the other ranks."""

OTHERS: list[subprocess.Popen] = []
"""The processes of the ranks from 1 on."""


def everywhere(function, *arguments):
    """Call a function of the target's file on every rank, and return the result of rank 0.

    After any error that is no refusal, the ranks may wait for each other: the others are ended, and the next call
    starts them again. A call also starts them again if a rank has ended since the last call.
    """
    if any(process.poll() is not None for process in OTHERS):
        _end()
    try:
        if not OTHERS:
            _start(inspect.getfile(function))
        call = io.BytesIO()  # A pickle of torch alone would lack unsigned integers.
        torch.save((function.__name__, arguments), call)
        for process in OTHERS:
            pickle.dump(call.getvalue(), process.stdin)
            process.stdin.flush()
        return function(*arguments)
    except REFUSALS:
        raise
    except BaseException:
        _end()
        raise


def of_rank(array, order, axis=2, fill=None):
    """Return the tokens that this rank holds; `order` lists those of all ranks, and tokens past the end are filled."""
    fill = (torch.nan if array.is_floating_point() else 0) if fill is None else fill
    shape = list(array.shape)
    shape[axis] = len(order) - shape[axis]
    padded = torch.cat([array, array.new_full(shape, fill)], axis)
    return padded.index_select(axis, torch.from_numpy(numpy.split(order, RANKS)[dist.get_rank()].copy()))


def joined(array, order, length, axis=2):
    """Put the tokens of all ranks into place, and leave out those past the end."""
    parts = [torch.empty_like(array, memory_format=torch.contiguous_format) for _ in range(RANKS)]
    dist.all_gather(parts, array.contiguous())
    return torch.cat(parts, axis).index_select(axis, torch.from_numpy(numpy.argsort(order)[:length]))


def _start(path):
    store = TCPStore("localhost", 0, RANKS, is_master=True, timeout=START, wait_for_workers=False)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for rank in range(1, RANKS):
        command = [sys.executable, "-P", "-c", SERVE, path, str(rank), str(store.port)]
        OTHERS.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=sys.stderr))
    _join(0, store)


def _end():
    """End the other processes; what this one still waits for fails at once."""
    for process in OTHERS:
        process.kill()
        process.wait()
        process.stdin.close()
    OTHERS.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(rank, store):
    torch.set_num_threads(1)
    store.set(f"ready/{rank}", "")
    store.wait([f"ready/{other}" for other in range(RANKS)], START)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=TIMEOUT)


def serve(path, rank, port):
    """Answer the calls of rank 0 until it ends."""
    functions = runpy.run_path(path)
    _join(rank, TCPStore("localhost", port, RANKS, timeout=START))
    while True:
        try:
            call = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        name, arguments = torch.load(io.BytesIO(call), weights_only=False)
        try:
            functions[name](*arguments)
        except REFUSALS:
            continue
