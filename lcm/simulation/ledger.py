"""What happens on a simulated CUDA device: memory by owner and phase, FLOPs, waits of the host, wrong devices.

Every operation of torch goes through a Ledger. FakeTensorMode, below it, finds shapes and dtypes; nothing is computed.
Bytes are counted per storage, rounded up to 512 as in the caching allocator of CUDA.
"""

import contextlib
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

GRANULE = 512  # bytes
ROOT = Path(__file__).resolve().parents[2]
OWN = (str(ROOT / "lcm"), str(ROOT / "train_"), str(ROOT / "lcm_common"))
HERE = str(Path(__file__).parent)
aten = torch.ops.aten


def place() -> str:
    """The innermost line of this project's code that is running, as file:line."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(OWN) and not name.startswith(HERE):
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"


def rounded(size: int) -> int:
    """The bytes that the allocator takes for a size."""
    return -(-size // GRANULE) * GRANULE


class Ledger(TorchDispatchMode):
    """Counts what is done on the simulated device, or with another type on a real one. `within` sets the phase.

    Sizes are in bytes. An owner is what memory is for: the phase that allocated it, until `assign` names another.
    """

    def __init__(self, device_type: str = "cuda") -> None:
        super().__init__()
        self.device_type = device_type
        self.phase = "start"
        self.storages: dict[int, tuple[int, str]] = {}  # address: (bytes, owner), of those that are alive
        self.by_owner: Counter[str] = Counter()
        self.current = 0
        self.waits: Counter[tuple[str, str, str]] = Counter()  # (phase, kind, place)
        self.generators: dict[int, torch.device] = {}  # address: device
        self.start_step()

    def start_step(self) -> None:
        """Forget peaks, FLOPs and waits; memory that is alive stays counted."""
        self.at_start = self.current
        self.peak, self.peak_phase, self.at_peak = self.current, self.phase, Counter(self.by_owner)
        self.phase_peaks: Counter[str] = Counter()
        self.flops: dict[str, Counter[str]] = defaultdict(Counter)  # phase: {dtype: FLOPs}
        self.bytes_moved: Counter[str] = Counter()  # by phase
        self.kernels: Counter[str] = Counter()  # by phase: operations that read or write memory of the device
        self.float32_places: Counter[tuple[str, str]] = Counter()  # (phase, place): FLOPs in float32
        self.float64_places: Counter[tuple[str, str]] = Counter()
        self.waits.clear()

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Count what is done inside as this phase."""
        outer, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = outer

    def wait(self, kind: str) -> None:
        """Note that the host waits for the device here."""
        self.waits[self.phase, kind, place()] += 1

    def assign(self, tensors: Iterable[torch.Tensor], owner: str) -> None:
        """Name the owner of the memory of tensors."""
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            address = local.untyped_storage()._cdata
            if address in self.storages:
                size, before = self.storages[address]
                self.by_owner[before] -= size
                self.by_owner[owner] += size
                self.storages[address] = (size, owner)

    def allocate(self, tensor: torch.Tensor, owner: str) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self.storages:
            return
        size = rounded(storage.nbytes())
        self.storages[address] = (size, owner)
        self.add(size, owner)
        weakref.finalize(storage, self.free, address)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Note that a storage has another size now."""
        if storage._cdata in self.storages:
            before, owner = self.storages[storage._cdata]
            size = rounded(storage.nbytes())
            self.storages[storage._cdata] = (size, owner)
            self.add(size - before, owner)

    def add(self, size: int, owner: str) -> None:
        """Count more memory, or less."""
        self.current += size
        self.by_owner[owner] += size
        self.phase_peaks[self.phase] = max(self.phase_peaks[self.phase], self.current)
        if self.current > self.peak:
            self.peak, self.peak_phase, self.at_peak = self.current, self.phase, Counter(self.by_owner)

    def free(self, address: int) -> None:
        size, owner = self.storages.pop(address)
        self.current -= size
        self.by_owner[owner] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the operation comes again, with the part of the tensor that is here
        kwargs = kwargs or {}
        operation = func._overloadpacket
        if operation is torch.ops.prim.device:  # `tensor.device`, half of all calls
            return func(*args)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if operation is aten._local_scalar_dense:
            return self.read_number(func, args, kwargs)
        if operation is aten.equal:
            return True
        if operation is aten._pin_memory:
            return args[0]
        if operation is aten.is_pinned:
            return True
        output = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        on_device = [tensor for tensor in outputs if tensor.device.type == self.device_type]
        self.check_generator(func, args, kwargs, on_device)
        if operation in (aten._to_copy, aten.copy_, aten.copy):
            source = args[0] if operation is aten._to_copy else args[1]
            is_non_blocking = kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True)
            if outputs and source.device.type != outputs[0].device.type and source.numel() and not is_non_blocking:
                self.wait(f"copy from {source.device.type} to {outputs[0].device.type}")
        owner = self.phase
        if operation is aten._to_copy and self.owner_of(args[0]).startswith("weights"):
            owner = "weights cast by autocast"
        for tensor in on_device:
            self.allocate(tensor, owner)
        self.count(func, args, kwargs, output, inputs, on_device)
        return output

    def owner_of(self, tensor: torch.Tensor) -> str:
        return self.storages.get(tensor.untyped_storage()._cdata, (0, ""))[1]

    def read_number(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`item()`: a number that is known, else a made-up one; for the device a wait."""
        try:
            return func(*args, **kwargs)
        except DataDependentOutputException:
            tensor = args[0]
            if tensor.device.type == "cuda":
                self.wait("item")
            number = 0.0 if tensor.device.type == "cuda" else 1.0  # 0 overflows, 0 NaNs
            kind = bool if tensor.dtype is torch.bool else float if tensor.is_floating_point() else int
            return kind(number)

    def check_generator(self, func: Any, args: Any, kwargs: Any, on_device: list[torch.Tensor]) -> None:
        """Raise RuntimeError, as CUDA does, if random numbers of the device come from a generator of the host."""
        generator: Any = kwargs.get("generator")
        generator = generator or next((arg for arg in args if isinstance(arg, torch.Generator)), None)
        if generator is None or not on_device:
            return
        device = self.generators.get(generator._cdata, generator.device)
        if device.type != self.device_type:
            expected = f"expected a generator on {self.device_type}, but found {device.type}"
            raise RuntimeError(f"{func}: {expected}, at {place()}")

    def count(
        self, func: Any, args: Any, kwargs: Any, output: Any, inputs: list[torch.Tensor], on_device: list[torch.Tensor]
    ) -> None:
        """Add up FLOPs, bytes and kernels of one operation on the device."""
        from_device = [tensor for tensor in inputs if tensor.device.type == self.device_type]
        if not on_device and not from_device:
            return
        read = {tensor.untyped_storage()._cdata for tensor in from_device}
        written = [tensor for tensor in on_device if tensor.untyped_storage()._cdata not in read]
        if written or func._schema.is_mutable:
            self.bytes_moved[self.phase] += sum(t.numel() * t.element_size() for t in (*from_device, *written))
            self.kernels[self.phase] += 1
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=output)
            dtype = str(from_device[0].dtype).removeprefix("torch.")
            self.flops[self.phase][dtype] += flops
            if dtype == "float32":
                self.float32_places[self.phase, place()] += flops
        if any(tensor.dtype is torch.float64 for tensor in on_device):
            self.float64_places[self.phase, place()] += 1
