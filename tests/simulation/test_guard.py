"""A build of torch without CUDA does on the simulated GPU what one with CUDA does."""

import pytest

from lcm.simulation.many import SERVER

SIZE = 4 * 2**20  # bytes of a tensor


def backward(operation, sending):
    """Send the peak of memory of one operation and its backward pass."""
    import torch

    from lcm.simulation.device import SimulatedCuda

    with SimulatedCuda() as device:
        x = torch.zeros(SIZE // 4, device="cuda", requires_grad=True)
        getattr(torch.nn.functional, operation)(x).sum().backward()
        sending.send(device.ledger.peak)


@pytest.mark.parametrize("operation", ["silu", "mish", "gelu"])
def test_a_backward_pass_is_one_kernel(operation):
    """The input, and then its gradient, are in memory, and no parts of a formula."""
    receiving, sending = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=backward, args=(operation, sending))
    process.start()
    sending.close()
    peak = receiving.recv()
    process.join()
    assert 2 * SIZE <= peak < 2.1 * SIZE
