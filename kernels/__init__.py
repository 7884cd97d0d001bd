"""Device code: one file per op family with its ``@triton.jit`` kernels, their launcher and their configs.

Nothing here knows an ``nn.Module``, and nothing is imported eagerly: ``import fastnets.kernels`` needs
neither triton nor a GPU, ``import fastnets.kernels.conv`` needs triton.

Every file of kernels (``batch_norm``, ``conv``, ``depthwise``, ...) has, besides its public launchers:

``configs(device: Device) -> list[Config]``
    every config that the file's heuristic may pick on that device, and nothing else. The ahead-of-time lane
    compiles each of them for each architecture, so a config that is not listed is not shipped.

``representative_calls() -> list[RepresentativeCall]``
    a few calls on meta tensors that reach every kernel and every compile-time branch of the file:
    ``RepresentativeCall(name, thunk)`` of ``kernels.launch``, where ``thunk(config)`` calls the launcher
    with that config, or with the heuristic's choice for ``config=None``. A config that cannot serve a call
    (a tile the shape does not allow) raises ``UnsupportedConfig``, and the pair is left out.

Launchers go through ``kernels.launch.launch``, which is what makes them observable and runnable on meta
tensors.
"""
