"""Puts what `prove` left in a folder into results.json and table.md there; exit 1 if a part failed."""

import json
import sys
import time
from pathlib import Path

out = Path(sys.argv[1])


def text(name):
    path = out / name
    return path.read_text(errors="replace").strip() if path.exists() else ""


def objects(name):
    """The JSON objects of a part's log, one a line; none if it did not end well."""
    try:
        return [json.loads(line) for line in text(f"{name}.log").splitlines()]
    except ValueError:
        return []


def table(name):
    """The rows of the table that a part printed, by the names of its columns."""
    rows = [line.strip("| ").split(" | ") for line in text(f"{name}.log").splitlines() if line.startswith("| ")]
    return [dict(zip(rows[0], row)) for row in rows[2:]]


parts = {}
for path in sorted(out.glob("*.status")):
    status, seconds = path.read_text().split()
    parts[path.stem] = {"status": int(status), "seconds": int(seconds)}


def done(name):
    return parts.get(name, {}).get("status") == 0


def trace(name):
    """Whose clock timed the trace that a part wrote, and the ops in it."""
    whole = json.loads(text(f"{name}.trace.json"))
    ops = [event["name"] for event in whole["traceEvents"] if event.get("cat") == "ops"]
    return whole["otherData"]["clock"], ops


def profile():
    """Where the time of one answer went, and what watching cost; None if the part did not end well."""
    if not done("profile"):
        return None
    return {"clock": trace("profile")[0], "said": text("profile.err").splitlines()[-1], "ops": table("profile")}


def ranges():
    """What a profiler was told, held against the trace of the same run; None if none could be asked."""
    if not done("nvtx"):
        return None
    stages, nodes, depth, least = [], [], 0, 0
    for line in text("ranges").splitlines():
        word, _, name = line.partition(" ")
        if word == "push":
            (nodes if depth else stages).append(name)
        depth += 1 if word == "push" else -1
        least = min(least, depth)
    clock, ops = trace("nvtx")
    wrong = {
        "the ops are not timed by the device": clock != "device",
        "not every range ends, and once": (depth, least) != (0, 0),
        "the stages are not vision, prefill and decode": set(stages) != {"vision", "prefill", "decode"},
        # The run that the trace shows is the last.
        "the ranges are not the ops of the trace": not ops or nodes[-len(ops) :] != ops,
    }
    return {"ranges": len(stages) + len(nodes), "wrong": [what for what, is_so in wrong.items() if is_so]}


SANITIZER = [f"{tool}{of}" for tool in ("memcheck", "racecheck", "synccheck") for of in ("", "-run")]
results = {
    "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    "commit": Path("commit").read_text().strip(),
    "gpu_before": text("gpu-before.csv"),
    "gpu_after": text("gpu-after.csv"),
    # What ran, so that the ledger enters no other.
    "kernels": (objects("devices") or [{}])[0].get("kernel_digests", {}),
    "parts": parts,
    # What each test program said of its tests and of its headroom.
    "cases": {
        name: [line for line in text(f"{name}.log").splitlines() if line.startswith("test ") or "bound" in line]
        for name in parts
        if (Path("cases") / name).exists()
    },
    "demo": (objects("demo") or [None])[0],
    "sanitizer": {tool: text(f"{tool}.log").splitlines()[-1:] for tool in SANITIZER},
    "torch": (objects("torch") or [[]])[0],
    "ops": (objects("ops") or [[]])[0],
    "bench": objects("7b") + objects("7b-deep") + objects("13b"),
    # The same with every kernel launched anew, and with a picture that is small and no JPEG.
    "anew": objects("7b-launches"),
    "picture": objects("7b-picture"),
    "profile": profile(),
    "nvtx": ranges(),
}
(out / "results.json").write_text(json.dumps(results, indent=1) + "\n")

lines = [f"{results['gpu_before']}; commit {results['commit']}; {results['date']}", ""]
benches = [("", results["bench"]), (", launched anew", results["anew"]), (", a PNG of 448x448", results["picture"])]
if any(rows for _, rows in benches):
    lines += ["| test | t/s | ms | floor ms | of ceiling | launches |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
for how, row in [(how, row) for how, rows in benches for row in rows]:
    lines.append(
        f"| {row['model_type']} {row['test']}{how} | {row['avg_ts']:.1f} | {row['avg_ns'] / 1e6:.3f} |"
        f" {row['floor_ms'] or 0:.3f} | {row['percent_of_ceiling'] or 0:.0f} % | {row['launches_per_step']:.0f} |"
    )
for part in results["ops"]:
    lines += ["", part["test"], "", "| op | shape | us | of ceiling |", "| --- | --- | ---: | ---: |"]
    for op in part["ops"]:
        share = 100 * op["floor"] / op["seconds"] if op["floor"] else 0
        lines.append(f"| {op['op']} | {op['shape']} | {op['seconds'] * 1e6 / op['calls']:.1f} | {share:.0f} % |")
if results["torch"]:
    lines += ["", "| PyTorch | us | TFLOP/s | GB/s |", "| --- | ---: | ---: | ---: |"]
for row in results["torch"]:
    lines.append(f"| {row['name']} | {row['us']:.1f} | {row['tflops']:.0f} | {row.get('gb_per_s', 0):.0f} |")
if results["profile"]:
    top = ", ".join(f"{row['op']} {row['shape']} {row['share']}" for row in results["profile"]["ops"][:3])
    lines += ["", f"profile, by the clock of the {results['profile']['clock']}: {top}; {results['profile']['said']}"]
if results["nvtx"]:
    lines += ["", f"NVTX: {results['nvtx']['ranges']} ranges; {'; '.join(results['nvtx']['wrong']) or 'as in the trace'}"]
(out / "table.md").write_text("\n".join(lines) + "\n")
print("\n".join(lines))

failed = [name for name in parts if not done(name)]
if results["nvtx"] and results["nvtx"]["wrong"]:
    failed.append("ranges")
if failed:
    sys.exit(f"failed: {', '.join(failed)}")
