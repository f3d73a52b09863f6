"""What fits where: what a file takes here, and what it would do on the devices of runtime/devices.toml."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from f2gguf.runtime.fit.devices import devices, work_of
from f2gguf.runtime.fit.memory import memory_of, model_memory, usual_tokens
from f2gguf.runtime.gguf.header import Header


def fits(header: Header, *, pooling: str) -> dict[str, Any]:
    """Bytes of memory with texts of `usual_tokens`, and for each device whether the file fits, and how fast it is.

    For JSON; what is not known is None. It asks a process of its own, and takes a second or two.
    """
    memory = memory_of(model_memory(header, pooling=pooling), header, header.path.stat().st_size)
    work = work_of(header)
    return {
        "max_tokens": usual_tokens(header),
        "memory": asdict(memory) | {"total_bytes": memory.total_bytes, "required_bytes": memory.required_bytes},
        "devices": [
            {
                "name": device.name,
                "memory_gb": device.memory_gb,
                "fits": device.holds(memory),
                **asdict(device.speed(work)),
            }
            for device in devices().values()
        ],
    }
