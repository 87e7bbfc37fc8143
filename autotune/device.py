"""What the library knows of a GPU: the figures that its cost model, its store and its static checks need.

Figures are the vendors' (dense rates, no sparsity) except ``dram_gbs``, which is a copy's measured rate where known.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class DeviceSpec:
    """One GPU, or the compile target that stands for its family.

    Attributes:
        slug: folder name in the store (``"nvidia_h200"``).
        target: what Triton compiles for (``"sm_90"``, ``"gfx942"``).
        sms: multiprocessors (AMD: compute units).
        smem_kb: shared memory one program may use, in KiB (AMD: LDS).
        l2_mb: last-level cache in MiB.
        dram_gbs: memory rate in GB/s, reads plus writes.
        tflops: dense multiply-add rate by precision: ``"16"``, ``"tf32"``, ``"ieee"`` (the fp32 pipes).
    """

    slug: str
    target: str
    sms: int
    smem_kb: int
    l2_mb: int
    dram_gbs: float
    tflops_16: float
    tflops_tf32: float
    tflops_ieee: float

    @property
    def is_amd(self) -> bool:
        return self.target.startswith("gfx")

    @property
    def has_tma(self) -> bool:
        """Does a tensor memory accelerator copy boxes of a tensor to where the tensor cores read them? That of sm_120
        copies too, but there operands pass through registers."""
        return self.target in ("sm_90", "sm_100")

    @property
    def warp_size(self) -> int:
        return 64 if self.is_amd else 32

    def tflops(self, precision: str) -> float:
        return {"16": self.tflops_16, "tf32": self.tflops_tf32, "tf32x3": self.tflops_tf32 / 3}.get(
            precision, self.tflops_ieee
        )


DEVICES = {
    spec.slug: spec
    for spec in (
        DeviceSpec("nvidia_a100", "sm_80", 108, 163, 40, 1750, 312, 156, 19.5),
        DeviceSpec("nvidia_h100", "sm_90", 132, 227, 50, 3000, 788, 394, 67),
        DeviceSpec("nvidia_h200", "sm_90", 132, 227, 50, 4300, 788, 394, 67),
        DeviceSpec("nvidia_b200", "sm_100", 148, 227, 126, 7000, 2250, 1125, 75),
        DeviceSpec("nvidia_rtx_5090", "sm_120", 170, 99, 96, 1600, 210, 105, 105),
        DeviceSpec("amd_mi300x", "gfx942", 304, 64, 256, 4300, 1307, 654, 163),
    )
}
# The device whose figures stand for a compile target when only the target is known.
TARGETS = {
    "sm_80": "nvidia_a100",
    "sm_90": "nvidia_h200",
    "sm_100": "nvidia_b200",
    "sm_120": "nvidia_rtx_5090",
    "gfx942": "amd_mi300x",
}


def named(name: str) -> DeviceSpec:
    """A device by slug (``nvidia_h200``), by its slug without the vendor (``h200``) or by target (``sm_90``)."""
    wanted = name.lower().replace("-", "_").replace(" ", "_")
    if wanted in TARGETS:
        return DEVICES[TARGETS[wanted]]
    for slug, spec in DEVICES.items():
        if wanted in (slug, slug.split("_", 1)[1]):
            return spec
    raise ValueError(f"unknown device {name!r}: known are {', '.join([*DEVICES, *TARGETS])}")


def detect(device: torch.device) -> DeviceSpec:
    """The spec of a torch device; ``TRITUNE_DEVICE`` overrides it, and the CPU (interpreter) stands in as an H200."""
    override = os.environ.get("TRITUNE_DEVICE")
    if override:
        return named(override)
    if device.type != "cuda" or not torch.cuda.is_available():
        return DEVICES["nvidia_h200"]
    return _of_cuda(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _of_cuda(index: int) -> DeviceSpec:
    properties = torch.cuda.get_device_properties(index)
    words = properties.name.lower().replace("-", " ").split()
    for slug, spec in DEVICES.items():
        if all(word in words for word in slug.split("_", 1)[1].split("_")):
            return spec
    if torch.version.hip:
        target = properties.gcnArchName.split(":")[0]
    else:
        target = f"sm_{properties.major}{properties.minor}"
    family = DEVICES[TARGETS.get(target, "nvidia_a100")]
    return DeviceSpec(
        slug="_".join(words).replace("/", "_"),
        target=target,
        sms=properties.multi_processor_count,
        smem_kb=getattr(properties, "shared_memory_per_block_optin", family.smem_kb * 1024) // 1024,
        l2_mb=properties.L2_cache_size >> 20,
        dram_gbs=family.dram_gbs,
        tflops_16=family.tflops_16 * properties.multi_processor_count / family.sms,
        tflops_tf32=family.tflops_tf32 * properties.multi_processor_count / family.sms,
        tflops_ieee=family.tflops_ieee * properties.multi_processor_count / family.sms,
    )
