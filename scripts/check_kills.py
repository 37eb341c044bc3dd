"""Kills a run of a mixed stream at random moments, continues it, and compares its end with that of an undisturbed run.

    python scripts/check_kills.py                      20 moments (a few minutes on 2 cores)
    python scripts/check_kills.py --moments 5 --seed 1

The stream has shared and isolated tasks, a divided one, memory, a deletion, partial retraining and unlearning in place
(tests/small_run.py). Every other moment is a point in time, the others an optimizer step, drawn over the whole run. Each
run is killed by SIGKILL, and then continued by the same call in a new process. Compared are the bytes below model/ (but
README.md), adapters/ and memory/, and every metric. Ends with 1 if an end differs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from small_run import die, in_process, outcome, write_recipe

from hf_clmul.run.log import RunLog


def after(seconds: float) -> None:
    """Dies when so much time has passed, wherever it is."""
    timer = threading.Timer(seconds, die)
    timer.daemon = True
    timer.start()


def at_step(number: int) -> None:
    """Dies at the end of the n-th optimizer step of the run, before it is logged or saved."""
    whole, steps = RunLog.on_step_end, [0]

    def on_step_end(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        if steps[0] == number:
            die()
        return whole(self, *args, **kwargs)

    RunLog.on_step_end = on_step_end


def timed(point: Any, args: tuple, recipe: Path, out: Path) -> tuple[int, float]:
    began = time.monotonic()
    return in_process(point, args, recipe, out), time.monotonic() - began


def end(root: Path) -> dict[str, Any]:
    base = json.loads((root / "results.json").read_text())["base_sha256_after"]
    return {**outcome(root), "base": {"sha256": base}}


def reached(root: Path) -> str:
    """What the run was at when it died: its last request that had begun."""
    begun = sorted(root.glob("requests/*/settings.json"))
    if not begun:
        return "before the first request"
    name = begun[-1].parent.name
    return f"after {name}" if (begun[-1].parent / "result.json").is_file() else f"in {name}"


def different(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of all that is not the same to the bit."""
    names = []
    for kind in ("files", "metrics", "samples", "base"):
        both = found[kind].keys() | expected[kind].keys()
        names += [f"{kind}: {name}" for name in sorted(both) if found[kind].get(name) != expected[kind].get(name)]
    return names + ["steps"] * (found["steps"] != expected["steps"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the runs there; a temporary folder if left out")
    wanted = parser.parse_args()
    root = wanted.folder or Path(tempfile.mkdtemp())
    root.mkdir(parents=True, exist_ok=True)
    recipe, draw, good = write_recipe(root, "stream"), random.Random(wanted.seed), 0
    in_process(None, (), recipe, root / "first")  # the first one imports everything
    _, whole = timed(None, (), recipe, root / "undisturbed")
    expected = end(root / "undisturbed")
    if odd := different(end(root / "first"), expected):
        print(f"two undisturbed runs differ already: {', '.join(odd[:5])}")
        return 1
    steps = sum(expected["steps"])
    print(
        f"undisturbed: {whole:.1f} s, {steps} optimizer steps, {len(expected['files'])} files, "
        f"{len(expected['metrics'])} metrics"
    )
    for i in range(wanted.moments):
        seconds, step = draw.uniform(0, whole), draw.randint(1, steps)
        point, args, said = (
            (after, (seconds,), f"at {seconds:5.2f} s") if i % 2 == 0 else (at_step, (step,), f"at step {step}")
        )
        out = root / f"moment-{i:02d}"
        code = in_process(point, args, recipe, out)
        where = reached(out) if code == -signal.SIGKILL else "not killed: it had ended"
        again, took = timed(None, (), recipe, out)
        odd = different(end(out), expected) if again == 0 else [f"continuing it ended with {again}"]
        good += code == -signal.SIGKILL and not odd
        verdict = "identical" if not odd else f"DIFFERENT: {', '.join(odd[:3])}, {len(odd)} in all"
        print(f"{i + 1:2d}  killed {said:<10}  {where:<28}  continued in {took:4.1f} s  {verdict}", flush=True)
        if not odd:
            shutil.rmtree(out)
    if wanted.folder is None and good == wanted.moments:
        shutil.rmtree(root)
    print(f"{good} of {wanted.moments} killed runs ended bit for bit like the undisturbed one")
    return 0 if good == wanted.moments else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
