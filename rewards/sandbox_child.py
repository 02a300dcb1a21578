"""The child process that runs a reward by an untrusted author: `python -m steer.rewards.sandbox_child`.

Frames on standard input and output: 8 bytes of length, then the content. The first frame is JSON with the code and the
limits; then, for each batch, JSON {"shape": …, "prompts": …} and the pixels in fp32. Replies are JSON. Before the code
is compiled the process gives up: the network (its own namespace where the system allows one), opening files and
sockets (no free file descriptor), writing files, new processes, and memory beyond a limit.
"""

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
MAX_SCORES = 100_000


def read_frame(stream: BinaryIO) -> bytes | None:
    """Read one frame; None at the end of the stream."""
    size = stream.read(8)
    return stream.read(int.from_bytes(size)) if len(size) == 8 else None


def frame(content: bytes) -> bytes:
    """Return the content as a frame."""
    return len(content).to_bytes(8) + content


def leave_network() -> bool:
    """Move this process to its own network namespace, before any thread starts; return whether the system allows it."""
    try:
        return ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0
    except (OSError, AttributeError):  # no such call on this system
        return False


def limit(memory: float) -> None:
    """Give up files, processes, and memory beyond `memory` GiB in addition to the current use."""
    used = int(_status("VmSize")) * 1024 if sys.platform == "linux" else 0
    most = used + int(memory * 2**30)
    for kind, value in (
        (resource.RLIMIT_AS, most),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 3),  # the standard streams: nothing else can be opened
    ):
        resource.setrlimit(kind, (value, value))


def _status(name: str) -> str:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(line.split()[1] for line in file if line.startswith(f"{name}:"))


def helper_functions(clip: str | None) -> dict[str, Callable[..., Any]]:
    """Return the helpers of rewards by name; clip_cosine only if a CLIP is named."""
    from steer.rewards import sandbox_helpers
    from steer.rewards.code_rules import HELPERS

    given = {name: getattr(sandbox_helpers, name) for name in HELPERS if name != "clip_cosine"}
    if clip is not None:
        given["clip_cosine"] = sandbox_helpers.load_clip_cosine(clip)
    return given


def main() -> None:
    """Answer frames until the input ends."""
    alone = leave_network()
    import torch

    from steer.rewards.code_rules import compile_reward

    torch.set_num_threads(1)
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    start = json.loads(read_frame(stdin) or b"{}")

    def answer(payload: dict[str, Any]) -> None:
        stdout.write(frame(json.dumps(payload).encode()))
        stdout.flush()

    try:
        helpers = helper_functions(start["clip"] if "clip_cosine" in start["code"] else None)
        with torch.no_grad():  # triggers lazy imports of torch while files can still be opened
            warm = torch.rand(2, 3, 16, 16)
            [one(warm) for name, one in helpers.items() if name in ("luma", "saturation", "edges")]
            torch.fft.rfft2(warm).abs().std().sqrt().quantile(0.5)
        os.closerange(3, 4096)
        limit(start["memory"])
        reward = compile_reward(start["code"], helpers)
    except BaseException as error:  # noqa: BLE001 - whatever the code raises is reported
        answer({"error": describe(error)})
        return
    answer({"network": not alone})
    while (head := read_frame(stdin)) is not None and (pixels := read_frame(stdin)) is not None:
        seconds = int(time.process_time() + start["seconds"]) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
        answer(run(reward, json.loads(head), pixels))


def run(reward: Callable[[Any, Sequence[str]], Any], head: dict[str, Any], pixels: bytes) -> dict[str, Any]:
    """Score one batch: {"shape", "scores"}, or {"error"}."""
    import torch

    images = torch.frombuffer(bytearray(pixels), dtype=torch.float32).reshape(head["shape"])
    try:
        with torch.no_grad():
            scores = reward(images, head["prompts"])
        if not torch.is_tensor(scores):
            return {"error": f"reward must return a tensor of shape ({len(images)},), got {type(scores).__name__}"}
        if scores.numel() > MAX_SCORES:
            return {"error": f"reward must return a tensor of shape ({len(images)},), got {tuple(scores.shape)}"}
        return {"shape": list(scores.shape), "scores": scores.float().flatten().tolist()}
    except BaseException as error:  # noqa: BLE001 - whatever the code raises is reported
        return {"error": describe(error)}


def describe(error: BaseException) -> str:
    """Describe an error of the code in one line, with its line number in the file."""
    trace, number = error.__traceback__, None
    while trace is not None:
        number = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "reward.py" else number
        trace = trace.tb_next
    where = f"line {number}: " if number else ""
    return f"{where}{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    main()
