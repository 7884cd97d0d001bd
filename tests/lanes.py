"""The lanes a test that launches kernels runs in.

A test takes the ``lane`` fixture, puts its inputs where the lane wants them and launches inside the lane::

    def test_it(lane):
        x = lane.put(torch.randn(2, 8, 5, 5))
        with lane:
            y = launcher(x)
        assert_close_to(reference64, stock, y)

- ``interpreter``: numpy, on CPU tensors (``tests/interpreter.py``).
- ``sm_80``, ``sm_90``: the PTX that Triton generates for that architecture, executed on CPU tensors by
  ptxsim, with each access checked against the tensors' own extents and conflicts between blocks raised.
- ``sm_80_strict``, ``sm_90_strict``: the same with warps interleaved at random, conflicts in shared memory
  raised, blocks in random order, and ptxas run. For a sample of the tests.
- ``gpu``: the kernel itself, on CUDA tensors.

Every test runs in the first three and in ``gpu``; ``@pytest.mark.lanes(...)`` names others. What cannot run
here is skipped with the reason. In all lanes memory that torch hands out is filled with NaN, so that an
output nobody wrote shows.
"""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_LANES = ("interpreter", "sm_80", "sm_90", "gpu")
STRICT_LANES = ("sm_80_strict", "sm_90_strict")
STRICT = {"schedule": "warp", "shared_races": "raise", "assemble": True, "order": "shuffled"}


class Lane:
    """One way to run a launcher; a context manager that can be entered again and again.

    ``name``; ``device`` where inputs must be; ``capability`` of the device that launchers see (None: they
    see none); ``launches``: what the emulator says of each launch of the last block (compiled lanes).
    """

    device = "cpu"
    capability: int | None = None

    def __init__(self, name: str):
        self.name = name
        self.launches: list = []
        self._stack: contextlib.ExitStack | None = None

    def unavailable(self) -> str | None:
        """Why this lane cannot run here, or None."""
        return None

    def __enter__(self):
        stack = contextlib.ExitStack()
        stack.enter_context(poisoned_memory())
        self._open(stack)
        self._stack = stack
        return self

    def __exit__(self, *error):
        stack, self._stack = self._stack, None
        return stack.__exit__(*error)

    def put(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """The tensor on the lane's device, with its strides and storage offset, gaps and overlaps."""
        if tensor is None or tensor.device.type == self.device:
            return tensor
        storage = tensor.untyped_storage()
        whole = torch.empty(0, dtype=tensor.dtype).set_(storage).to(self.device)
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def but(self, **options) -> "Lane":
        """The same lane with other options of the emulator; itself where it is not emulated."""
        return self

    def __repr__(self):
        return self.name


class InterpreterLane(Lane):
    def _open(self, stack):
        from tests.interpreter import interpreter

        stack.enter_context(interpreter())


class CompiledLane(Lane):
    def __init__(self, name, capability, **options):
        super().__init__(name)
        self.capability = capability
        self.options = {"bounds": "tensor", "races": "raise", **options}

    def but(self, **options):
        return CompiledLane(self.name, self.capability, **{**self.options, **options})

    def unavailable(self):
        return ptxsim_unavailable()

    def _open(self, stack):
        emulated = stack.enter_context(ptxsim().emulated_cuda(cc=self.capability, **self.options))
        self.launches = emulated.launches


class GPULane(Lane):
    device = "cuda"

    def unavailable(self):
        return None if torch.cuda.is_available() else "no CUDA device"

    def _open(self, stack):
        stack.callback(torch.cuda.synchronize)


LANES: dict[str, Lane] = {
    lane.name: lane
    for lane in (
        InterpreterLane("interpreter"),
        CompiledLane("sm_80", 80),
        CompiledLane("sm_90", 90),
        CompiledLane("sm_80_strict", 80, **STRICT),
        CompiledLane("sm_90_strict", 90, **STRICT),
        GPULane("gpu"),
    )
}


@contextlib.contextmanager
def poisoned_memory():
    """``torch.empty`` and its relatives hand out NaN (the largest value for integers) inside the block."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


def ptxsim_folder() -> Path:
    """Where the PTX emulator is looked for: ``FASTNETS_PTXSIM``, else beside the repository."""
    named = os.environ.get("FASTNETS_PTXSIM")
    return Path(named) if named else REPOSITORY.parent / "shared" / "tools" / "ptxsim"


def ptxsim_unavailable() -> str | None:
    folder = ptxsim_folder()
    if not (folder / "__init__.py").is_file():
        return f"no PTX emulator at {folder} (FASTNETS_PTXSIM names another folder)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1: kernels are interpreted, not compiled"
    return None


def ptxsim():
    """The emulator's package, loaded from its folder without putting the folder's siblings on the path."""
    if "ptxsim" not in sys.modules:
        folder = ptxsim_folder()
        spec = importlib.util.spec_from_file_location(
            "ptxsim", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules["ptxsim"] = module
        spec.loader.exec_module(module)
    return sys.modules["ptxsim"]
