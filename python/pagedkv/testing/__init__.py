"""For the tests of code that uses pagedkv: a machine without mercy.

    device = SimulatedDevice(seed=7)
    with pk.KVCache(spec, device=device, num_device_blocks=8, num_host_blocks=8) as kv:
        ...  # your engine's steps and swaps
    assert device.violations == []

Copies run as late, as torn and in as odd an order as what is declared allows, all of it decided by
the seed, and every pair of accesses that nothing orders is a violation, whether or not it did harm.

`device=CudaDevice(SimulatedCuda(seed=7))` runs the whole path of a GPU the same way: its streams,
events, uploads and kernels, without a GPU. Its `violations` are those of copies: what kernels do in
the wrong order shows in the contents alone.
"""

from pagedkv._core import CudaDevice, SimulatedCuda, SimulatedDevice

__all__ = ["CudaDevice", "SimulatedCuda", "SimulatedDevice"]
