"""Reads a memory snapshot with PyTorch's own reader, whose assertions check that its sums agree, walks along its trace,
and prints: bytes of all segments, bytes of all active blocks, the trace's peak, its last sum, its number of OOMs; then
the flame graph's lines.

Usage: read_snapshot.py <torch/cuda/_memory_viz.py> <snapshot>
"""

import importlib.util
import pickle
import sys

spec = importlib.util.spec_from_file_location("memory_viz", sys.argv[1])  # as a file: it needs nothing of PyTorch
viz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(viz)
with open(sys.argv[2], "rb") as file:
    snapshot = pickle.load(file)

viz.segsum(snapshot), viz.trace(snapshot), viz.trace_plot(snapshot), viz.segment_plot(snapshot)
live = peak = ooms = 0
sizes = {}
for event in snapshot["device_traces"][0]:
    if event["action"] == "alloc":
        assert event["addr"] not in sizes, "a block lies where another one is"
        sizes[event["addr"]] = event["size"]
        live += event["size"]
    elif event["action"] == "free_completed":
        assert sizes.pop(event["addr"]) == event["size"]
        live -= event["size"]
    ooms += event["action"] == "oom"
    peak = max(peak, live)
blocks = [block for segment in snapshot["segments"] for block in segment["blocks"]]
active = {b["address"]: b["requested_size"] for b in blocks if b["state"] == "active_allocated"}
assert active == sizes, "the blocks are not those that the trace leaves"
print(sum(segment["total_size"] for segment in snapshot["segments"]), sum(active.values()), peak, live, ooms)
print(viz.memory(snapshot, format_flamegraph=lambda lines: lines))
