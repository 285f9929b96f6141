"""A function in an interpreter of its own, where nobody else has used memory, threads or random numbers yet."""

import multiprocessing
import os
import signal
import traceback


def apart(function, *arguments, timeout=300):
    """What `function(*arguments)` returns there.

    Raises:
        TimeoutError: no answer after `timeout` seconds. The interpreter, and whatever it has forked, is killed.
        ChildProcessError: it died.
        RuntimeError: the function raised; the text is its traceback.
    """
    context = multiprocessing.get_context("spawn")
    answer, ours = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(ours, function, arguments))
    process.start()
    ours.close()
    try:
        if not answer.poll(timeout):
            raise TimeoutError(f"{function.__name__}{arguments} hangs: no answer after {timeout} s")
        returned, value = answer.recv()
    except EOFError:
        process.join(timeout)
        raise ChildProcessError(f"{function.__name__}{arguments} died, exit code {process.exitcode}") from None
    finally:
        if process.is_alive():
            try:
                os.killpg(process.pid, signal.SIGKILL)  # a session of its own: see _answer
            except ProcessLookupError:
                process.kill()
        process.join()
        answer.close()
    if not returned:
        raise RuntimeError(value)
    return value


def _answer(pipe, function, arguments):
    os.setsid()
    try:
        pipe.send((True, function(*arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
