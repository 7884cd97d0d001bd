"""The ahead-of-time lane: every kernel, config and architecture compiled, and what came out written down.

    python -m fastnets.bench.static                    a seeded sample on every architecture
    python -m fastnets.bench.static --full             all of it (minutes), --json FILE keeps the figures
    python -m fastnets.bench.static --arch 90 --kernel depthwise

Launches are observed on meta tensors with the architecture's device assumed, and each is compiled as the
launch itself would have it: by Triton's own argument binder, with the same specialisation on ones, alignment
and dtypes. No GPU is needed. What is shown was counted in the machine code; nothing here is a time on a GPU.

Exit status 1 where something does not compile, asks for more shared memory than the device has, or spills
registers.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import pkgutil
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastnets.bench.sass import MachineCode, read_cubin

__all__ = [
    "ARCHITECTURES",
    "Case",
    "Facts",
    "cases",
    "compile_launch",
    "facts_of",
    "inspect_call",
    "inspect_case",
]

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class Case:
    """One call of one module of kernels with one config, for one architecture."""

    module: str
    call: int
    name: str
    config: Any
    capability: int


@dataclass
class Facts:
    """What one kernel of a case compiled to, or why it did not."""

    module: str
    name: str
    kernel: str
    config: str
    capability: int
    shared_bytes: int = 0
    shared_limit: int = 0
    seconds: float = 0.0
    code: MachineCode | None = None
    error: str | None = None

    @property
    def fits(self) -> bool:
        return self.shared_bytes <= self.shared_limit

    @property
    def good(self) -> bool:
        return self.complaint is None

    @property
    def complaint(self) -> str | None:
        """What is wrong with it, in words."""
        if self.error is not None:
            return self.error
        if not self.fits:
            return f"{self.shared_bytes} bytes of shared memory, of {self.shared_limit}"
        return f"{self.code.spills} spills" if self.code.spills else None


def kernel_modules() -> list[str]:
    """Modules of ``fastnets.kernels`` that ship kernels: those that define ``representative_calls``."""
    import fastnets.kernels

    found = []
    for module in pkgutil.iter_modules(fastnets.kernels.__path__):
        loaded = importlib.import_module(f"fastnets.kernels.{module.name}")
        calls = getattr(loaded, "representative_calls", None)
        if calls is not None and calls.__module__ == loaded.__name__:
            found.append(module.name)
    return found


def cases(modules: list[str] | None = None, architectures=ARCHITECTURES) -> list[Case]:
    """Every case of the modules (all by default), whether or not the call takes the config."""
    from fastnets.kernels.device import device_for_capability

    result = []
    for module in modules or kernel_modules():
        loaded = importlib.import_module(f"fastnets.kernels.{module}")
        calls = loaded.representative_calls()
        for capability in architectures:
            for config in loaded.configs(device_for_capability(capability)):
                result += [Case(module, i, call.name, config, capability) for i, call in enumerate(calls)]
    return result


@contextlib.contextmanager
def _target(capability: int) -> Iterator[None]:
    """Triton's driver replaced by one that only says what to compile for."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Target:
        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            # Kernels compiled in this process are kept per device number.
            return 900_000 + capability

        def get_current_stream(self, device=None):
            return 0

    before = driver._active
    driver.set_active(Target())
    try:
        yield
    finally:
        driver._active = before


def compile_launch(launch, capability: int):
    """Compiles one observed ``Launch`` for a capability; Triton's ``CompiledKernel``, not loaded."""
    with _target(capability):
        return launch.kernel.run(
            *launch.args, grid=launch.grid, warmup=True, **launch.constexprs, **launch.config.options
        )


def facts_of(launch, capability: int, module: str = "", name: str = "") -> Facts:
    """Compiles a launch and reads its machine code; a refusal by the compiler is a fact too."""
    from fastnets.kernels.device import device_for_capability

    facts = Facts(module, name, launch.name, str(launch.config), capability)
    facts.shared_limit = device_for_capability(capability).shared_memory_per_block
    start = time.perf_counter()
    try:
        compiled = compile_launch(launch, capability)
        facts.shared_bytes = compiled.metadata.shared
        facts.code = read_cubin(compiled.asm["cubin"])
    except Exception as error:
        facts.error = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
        )
    facts.seconds = time.perf_counter() - start
    return facts


def observed(thunk, config, capability: int) -> list:
    """The launches of a call on meta tensors, for the device that stands for the capability."""
    from fastnets.kernels.device import assume_device
    from fastnets.kernels.launch import observe_launches

    seen: list = []
    with observe_launches(seen.append), assume_device(capability):
        thunk(config)
    return seen


def inspect_call(thunk, config=None, capability: int = 90) -> list[Facts]:
    """Facts of every kernel that ``thunk(config)``, a call on meta tensors, launches."""
    return [facts_of(launch, capability) for launch in observed(thunk, config, capability)]


def inspect_case(case: Case) -> list[Facts]:
    """Facts of every kernel of a case; none where the call does not take the config."""
    from fastnets.kernels.launch import UnsupportedConfig

    call = importlib.import_module(f"fastnets.kernels.{case.module}").representative_calls()[case.call]
    try:
        launches = observed(call.thunk, case.config, case.capability)
    except UnsupportedConfig:
        return []
    return [facts_of(launch, case.capability, case.module, case.name) for launch in launches]


def sample(everything: list[Case], count: int, seed: int) -> list[Case]:
    """A seeded sample that visits every (module, architecture) before any of them twice."""
    shuffled = random.Random(seed).sample(everything, len(everything))
    turns: Counter = Counter()
    keyed = []
    for case in shuffled:
        keyed.append((turns[case.module, case.capability], case))
        turns[case.module, case.capability] += 1
    keyed.sort(key=lambda pair: pair[0])
    return [case for _, case in keyed[:count]]


def _inspect_all(chosen: list[Case], jobs: int) -> Iterator[list[Facts]]:
    """The facts of each case, in the order they are known."""
    if jobs == 1:
        yield from map(inspect_case, chosen)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = [pool.submit(inspect_case, case) for case in chosen]
        for done in concurrent.futures.as_completed(waiting):
            yield done.result()


def _table(results: list[Facts]):
    from rich.table import Table

    table = Table(title="Compiled ahead of time (counted in the machine code)")
    for heading in ("sm", "kernel", "call", "config"):
        table.add_column(heading)
    for heading in ("regs", "spills", "shared KiB", "instr.", "loop", "matrix", "loads (bits: n)", "s"):
        table.add_column(heading, justify="right")
    for f in sorted(results, key=lambda f: (f.module, f.kernel, f.name, f.capability, f.config)):
        row = [str(f.capability), f.kernel, f.name, f.config.removeprefix("Config(").removesuffix(")")]
        if f.error is not None:
            table.add_row(*row, "", "", "", "", "", "", f.error, f"{f.seconds:.1f}", style="red")
            continue
        code, loop = f.code, f.code.loop
        loads = code.global_loads + code.async_copies
        row += [
            str(code.registers),
            str(code.spills),
            f"{f.shared_bytes / 1024:.0f}",
            str(code.instructions),
            str(loop.instructions) if loop else "-",
            f"{loop.matrix} {'/'.join(sorted(code.matrix_ops))}" if loop and loop.matrix else "-",
            " ".join(f"{bits}: {n}" for bits, n in sorted(loads.items(), reverse=True))
            + (f" bulk: {code.bulk_copies}" if code.bulk_copies else ""),
            f"{f.seconds:.1f}",
        ]
        table.add_row(*row, style=None if f.good else "red")
    return table


def _plain(value):
    """For JSON; ``dataclasses.asdict`` cannot copy a Counter."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Counter):
        return dict(sorted(value.items()))
    return sorted(value) if isinstance(value, frozenset) else value


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastnets.bench.static", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--full", action="store_true", help="every case instead of a sample")
    parser.add_argument(
        "--sample", type=int, default=42, metavar="N", help="cases in the sample (default: 42)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), metavar="SM")
    parser.add_argument(
        "--kernel", nargs="+", default=None, metavar="MODULE", help="modules of fastnets.kernels"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--quiet", action="store_true", help="print what is wrong and the summary, not the table"
    )
    options = parser.parse_args(argv)
    unknown = set(options.kernel or ()) - set(kernel_modules())
    if unknown:
        parser.error(f"no kernels in {', '.join(sorted(unknown))} (there are: {', '.join(kernel_modules())})")

    from rich.console import Console
    from rich.progress import Progress

    everything = cases(options.kernel, options.arch)
    chosen = everything if options.full else sample(everything, options.sample, options.seed)
    console = Console(width=None if sys.stdout.isatty() else 200)
    start = time.perf_counter()
    results: list[Facts] = []
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("compiling", total=len(chosen))
        for found in _inspect_all(chosen, options.jobs):
            results += found
            bar.advance(task)
            for f in found:
                if not f.good:  # at once: a whole run takes an hour
                    print(f"sm_{f.capability} {f.kernel} ({f.name}): {f.complaint}; {f.config}", flush=True)
    shown = [f for f in results if not f.good] if options.quiet else results
    if shown:
        console.print(_table(shown))
    failed = [f for f in results if f.error is not None]
    too_large = [f for f in results if f.error is None and not f.fits]
    spilling = [f for f in results if f.error is None and f.code.spills]
    console.print(
        f"{len(results)} kernels compiled of {len(chosen)} cases ({len(everything)} in all) in "
        f"{time.perf_counter() - start:.0f} s: {len(failed)} failed, {len(too_large)} ask for too much "
        f"shared memory, {len(spilling)} spill."
    )
    if options.json:
        with open(options.json, "w") as file:
            json.dump([_plain(f) for f in results], file, indent=1)
    return 1 if failed or too_large or spilling else 0


if __name__ == "__main__":
    sys.exit(main())
