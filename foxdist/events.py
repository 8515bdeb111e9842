"""Events and streams of the GPU at hand, by its number.

To find the current stream by itself, and to make an object of it each time it is asked, takes torch 10 us and more. A
layer over ranks asks some fifty times.
"""

import torch

_streams: dict[tuple[int, int], torch.cuda.Stream] = {}


def current_stream(gpu: int) -> torch.cuda.Stream:
    """The same object each time for the same stream."""
    name = gpu, torch._C._cuda_getCurrentRawStream(gpu)
    if name not in _streams:
        _streams[name] = torch.cuda.current_stream(gpu)
    return _streams[name]


def record(gpu: int) -> torch.cuda.Event:
    """An event after all that the current stream has been given so far."""
    event = torch.cuda.Event()
    event.record(current_stream(gpu))
    return event
