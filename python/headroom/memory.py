"""What a piece of PyTorch code allocates on the CPU."""

from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile


class MemoryReport(NamedTuple):
    """Bytes on the CPU, as PyTorch's allocator was asked for them."""

    added_peak: int  # the most that lived at a time, of what was allocated during the measurement
    largest: int  # the largest single allocation


def measure(run):
    """Calls run() and returns a MemoryReport of everything that PyTorch allocated meanwhile, inside operators too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        size = event.nbytes()  # below 0: freed
        live += size
        peak = max(peak, live)
        largest = max(largest, size)
    return MemoryReport(peak, largest)
