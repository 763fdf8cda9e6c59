"""Commands at the price of a fork: one process imports what is heavy, every command is its fork.

A fresh process needs eight seconds of CPU to import torch, transformers, DeepSpeed and the package;
most commands of the tests then work for less than one. `install` puts `ForkedPopen` in the place of
`subprocess.Popen`, in the tests' process and in every command that was forked, so that ranks which
torchrun starts are cheap too. A forked command has its own arguments, environment, folder, standard
streams, session and random state, and runs `python -m` or `python -c` by the interpreter's code.

What a fork could not show starts afresh: another interpreter or other options of it, an environment
that differs in what libraries read while they are imported, a child that watches its parent
(`AFRESH`), and every test marked `fresh`: the order of imports, signals while libraries load,
torchrun, waiting threads.

    python -m tests.helpers.fork_server NAME PID    serves under this name until process PID ends
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import importlib
import importlib.util
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from tests.helpers.commands import ROOT, environment

HEAVY = (
    "casa_train.train",  # first, since it tells DeepSpeed what to log
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imported by every optimiser
    "datasets",
    "matplotlib.figure",
    "casa_train.cost.dry_run",
    "casa_train.evaluate.evaluation",
    "casa_train.export.writer",
    "casa_train.report.run_page",
    "data_recipes.synthetic",
    "deepspeed.module_inject.auto_ep_layer",  # imported by every engine
)
# What libraries look at while they are imported.
IMPORT_TIME = ("PYTHON", "LD_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "TORCH", "PYTORCH")
IMPORT_TIME += ("CUDA", "NVIDIA", "HF_", "HUGGINGFACE", "TRANSFORMERS", "DS_", "XDG_")
IMPORT_TIME += ("HOME", "MPL", "ARROW", "TOKENIZERS")
# What torchrun reads, and sets for its ranks, the compiler for its processes, and commands, for
# less to read and for a GPU's memory.
LATER = ("TORCHELASTIC", "TORCH_ELASTIC", "TORCH_NCCL", "TORCHINDUCTOR", "TORCH_CPP_LOG_LEVEL")
LATER += ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "DS_ACCELERATOR")
# Asks the kernel to end it with its parent, which a fork of the server's is not a child of. Where
# nobody kills that parent, this variable says that it may be a fork.
AFRESH = {"casa_train.export.child"}
FORK_ALL = "CASA_TRAIN_TESTS_FORK_ALL"
STARTED = subprocess.Popen

_name, _owner = "", 0  # of the server that this process may ask


# ------------------------------------------------------------------------------- the tests' side


def available() -> bool:
    """Whether this interpreter has all that the server imports."""
    packages = {name.split(".")[0] for name in HEAVY}
    return hasattr(os, "pidfd_open") and all(map(importlib.util.find_spec, packages))


@contextlib.contextmanager
def install(session: str, owner: int) -> Iterator[None]:
    """Makes commands forks.

    :param session: all processes with one value of it share a server.
    :param owner: the process with which the server ends.
    """
    global _name, _owner
    _name, _owner = f"casa_train_tests_{session}", owner
    subprocess.Popen = ForkedPopen  # type: ignore[misc]
    try:
        yield
    finally:
        subprocess.Popen = STARTED  # type: ignore[misc]


def write_python(path: Path) -> None:
    """Writes a `python` for scripts that look for one: its commands are forks, too."""
    serving = f"{forward.__name__}({_owner}, sys.argv[1:])"
    code = f"import sys\nfrom {__name__} import {forward.__name__}\nsys.exit({serving})\n"
    path.write_text(f"#!{sys.executable}\n{code}")
    path.chmod(0o755)


def forward(owner: int, arguments: Sequence[str]) -> int:
    """Runs `python ARGUMENTS` and returns its exit code.

    :param owner: of the server.
    """
    # `-m` has the current folder on its path without being told.
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join(folder for folder in folders if folder != os.getcwd())
    with install(str(owner), owner):
        return subprocess.call([sys.executable, *arguments], env={**os.environ, "PYTHONPATH": path})


def _connected() -> socket.socket:
    """A connection to the server, which is started if there is none."""
    deadline = time.monotonic() + 60
    started = None
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect("\0" + _name)
            return connection
        except OSError:
            connection.close()
        assert time.monotonic() < deadline, f"no fork server {_name}"
        if started is None:  # of several at once one gets the name, and the others leave
            command = [sys.executable, "-m", __name__, _name, str(_owner)]
            started = STARTED(command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL)
        time.sleep(0.02)


class ForkedPopen(subprocess.Popen):  # type: ignore[type-arg]
    """`subprocess.Popen` whose Python commands are forks of the server, if they can be."""

    _connection: socket.socket | None = None

    def _execute_child(self, args: Any, executable: Any, *rest: Any) -> None:  # type: ignore[override]
        preexec, _, passed, cwd, env, _, _, shell, read_in, write_in, *more = rest
        read_out, write_out, read_err, write_err, signals, gid, gids, uid, umask, own, *group = more
        special = preexec or passed or shell or executable or gids or umask != -1 or not signals
        special = special or any(n is not None for n in (gid, uid)) or (group and group[0] != -1)
        command = args if isinstance(args, str) else [os.fsdecode(part) for part in args]
        if special or not _forkable(command):
            return super()._execute_child(args, executable, *rest)  # type: ignore[misc]
        environ = dict(os.environ if env is None else env)
        if (
            command[2] in AFRESH
        ):  # its threads, and a path with one folder twice, are imports' matter
            environ |= {n: os.environ[n] for n in ("OMP_NUM_THREADS", "PYTHONPATH")}
        request = {
            "command": command,
            "cwd": os.path.abspath(os.fsdecode(cwd or ".")),
            "env": environ,
            "own_session": bool(own),
        }
        connection = _connected()
        streams = [0, 1, 2]
        for i, descriptor in enumerate((read_in, write_out, write_err)):
            streams[i] = descriptor if descriptor != -1 else streams[i]
        body = json.dumps(request).encode()
        descriptors = array.array("i", streams).tobytes()
        head = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)]
        connection.sendmsg([struct.pack("I", len(body))], head)
        connection.sendall(body)
        pid = struct.unpack("i", _exactly(connection, 4))[0]
        if pid == 0:  # its environment is not the server's
            connection.close()
            return super()._execute_child(args, executable, *rest)  # type: ignore[misc]
        self.pid, self._connection, self._child_created = pid, connection, True
        self._close_pipe_fds(  # type: ignore[attr-defined]
            read_in, write_in, read_out, write_out, read_err, write_err
        )

    def _try_wait(self, flags: int) -> tuple[int, int]:
        if self._connection is None:
            return super()._try_wait(flags)  # type: ignore[misc]
        self._connection.setblocking(not flags & os.WNOHANG)
        try:
            status = _exactly(self._connection, 4)
        except BlockingIOError:
            return 0, 0
        self._connection.close()
        return self.pid, struct.unpack("i", status)[0]

    def _internal_poll(self, _deadstate: int | None = None, **kwargs: Any) -> int | None:
        if self._connection is None:
            return super()._internal_poll(_deadstate=_deadstate, **kwargs)  # type: ignore[misc]
        if self.returncode is None and self._waitpid_lock.acquire(False):  # type: ignore[attr-defined]
            try:
                pid, status = self._try_wait(os.WNOHANG) if self.returncode is None else (0, 0)
                if pid:
                    self._handle_exitstatus(status)  # type: ignore[attr-defined]
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode


def _exactly(connection: socket.socket, count: int) -> bytes:
    """So many bytes; a message of a few is never cut.

    :raises RuntimeError: the server is gone.
    """
    data = connection.recv(count)
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise RuntimeError("the fork server ended")
        data += more
    return data


def _forkable(command: Sequence[str]) -> bool:
    if isinstance(command, str) or len(command) < 3 or command[0] != sys.executable:
        return False
    options = command[1:] if command[1] != "-u" else command[2:]
    afresh = {__name__} if FORK_ALL in os.environ else {__name__, *AFRESH}
    return options[0] in ("-m", "-c") and options[1] not in afresh


# ----------------------------------------------------------------------------- the server's side


class Server:
    """Forks a process for every request until its owner ends.

    :raises OSError: another one has the name.
    """

    def __init__(self, name: str, owner: int) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind("\0" + name)
        self.listener.listen(100)
        before = set(os.environ)
        for module in HEAVY:
            importlib.import_module(module)
        # DeepSpeed looks for its ops with a C compiler, once a process.
        assert sys.modules["deepspeed.ops"].__compatible_ops__
        # A first composition leaves the tables of Hydra's grammar and its plugins behind.
        composer = importlib.import_module("casa_train.config.compose")
        composer.compose_config(["+experiment=demo", "trainer.steps=1"])
        self.environment = _read_by_imports(os.environ)
        self.set_by_imports = {n: v for n, v in self.environment.items() if n not in before}
        mine = str(os.getpid())
        tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != mine]
        threads = {(task / "comm").read_text().strip() for task in tasks}
        # Arrow's allocator starts its own anew in every fork.
        assert threads <= {"jemalloc_bg_thd"}, f"a fork would lack the threads {threads}"
        gc.collect()
        gc.freeze()  # a collection in a fork would copy every page
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.owner = os.pidfd_open(owner)
        self.selector.register(self.owner, selectors.EVENT_READ)
        self.forks: dict[int, tuple[int, socket.socket]] = {}  # by what watches them

    def serve(self) -> tuple[dict[str, Any], list[int]] | None:
        """Returns a request and its standard streams in its fork, None at the server's end."""
        while True:
            for key, _ in self.selector.select():
                file: Any = key.fileobj
                if file == self.owner:
                    for pid, _ in self.forks.values():
                        os.kill(pid, signal.SIGKILL)
                    return None
                if file is self.listener:
                    self.selector.register(file.accept()[0], selectors.EVENT_READ)
                elif file in self.forks:
                    self._report(file)
                else:
                    self.selector.unregister(file)
                    if (request := self._asked(file)) is not None:
                        return request

    def _report(self, watch: int) -> None:
        """Tells who waits for it how a fork ended."""
        pid, connection = self.forks.pop(watch)
        status = os.waitpid(pid, 0)[1]
        self.selector.unregister(watch)
        os.close(watch)
        with contextlib.suppress(OSError):  # nobody waits
            connection.sendall(struct.pack("i", status))
        connection.close()

    def _asked(self, connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
        """Answers with the id of a new fork, or 0 for what must start afresh."""
        head, data, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(12))
        if len(head) < 4:  # it asked nothing
            connection.close()
            return None
        streams = array.array("i")
        for _, _, content in data:
            streams.frombytes(content)
        request = json.loads(_exactly(connection, struct.unpack("I", head)[0]))
        request["env"] = self.set_by_imports | request["env"]
        pid = 0
        if _read_by_imports(request["env"]) == self.environment:
            pid = os.fork()
            if pid == 0:
                self._forget(connection)
                return request, list(streams)
        connection.sendall(struct.pack("i", pid))
        for descriptor in streams:
            os.close(descriptor)
        if pid == 0:
            connection.close()
            return None
        watch = os.pidfd_open(pid)
        self.forks[watch] = pid, connection
        self.selector.register(watch, selectors.EVENT_READ)
        return None

    def _forget(self, connection: socket.socket) -> None:
        """Closes in a fork what is the server's."""
        self.selector.close()
        for watch, (_, other) in self.forks.items():
            os.close(watch)
            other.close()
        os.close(self.owner)
        self.listener.close()
        connection.close()


def _read_by_imports(env: Mapping[str, str]) -> dict[str, str]:
    found = {name: value for name, value in env.items() if name.startswith(IMPORT_TIME)}
    return {name: value for name, value in found.items() if not name.startswith(LATER)}


def become(request: dict[str, Any], streams: list[int]) -> None:
    """Makes this fork the command, and runs it as the interpreter would."""
    if request["own_session"]:
        os.setsid()
    for target, descriptor in enumerate(streams):
        os.dup2(descriptor, target)
    for descriptor in streams:
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    command = request["command"]
    unbuffered = command[1] == "-u"
    kind, what, *arguments = command[2 if unbuffered else 1 :]
    for stream in (sys.stdout, sys.stderr):
        at_once = stream is sys.stderr or stream.isatty()
        stream.reconfigure(line_buffering=at_once, write_through=unbuffered)  # type: ignore[union-attr]
    tempfile.tempdir = None
    np.random.seed()
    gc.unfreeze = lambda: None  # what the server froze, too: a collection would copy every page
    sys.orig_argv = command
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    if kind == "-m":
        if what in AFRESH:  # it is told its parent's pid, and compares
            os.getppid = lambda: int(arguments[0])
        sys.path[0], sys.argv = os.getcwd(), ["-m", *arguments]
        if not hasattr(sys.modules.get(what), "__path__"):
            sys.modules.pop(what, None)  # as in a new process, where nothing imported it
        runpy._run_module_as_main(what)  # type: ignore[attr-defined]
    else:
        sys.path[0], sys.argv = "", ["-c", *arguments]
        exec(compile(what, "<string>", "exec"), main.__dict__)


def end(command: Callable[[], None]) -> NoReturn:
    """Leaves as the interpreter does, but frees nothing: that would copy what forks share.

    Threads are awaited and what was registered with atexit is called.
    """
    code = 0
    try:
        command()
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        if leave.code is not None and not isinstance(leave.code, int):
            print(leave.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
        if isinstance(error, KeyboardInterrupt):
            code = -signal.SIGINT
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


def main(name: str, owner: int) -> None:
    global _name, _owner
    _name, _owner = name, owner
    subprocess.Popen = ForkedPopen  # type: ignore[misc]  # before torchrun takes its own copy
    try:
        server = Server(name, owner)
    except OSError:
        return  # another one serves
    asked = server.serve()
    if asked is not None:
        end(lambda: become(*asked))


if __name__ == "__main__":
    from tests.helpers import fork_server  # the module that commands will know

    fork_server.main(sys.argv[1], int(sys.argv[2]))
