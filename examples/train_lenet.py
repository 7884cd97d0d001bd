"""LeNet-5 learns to read digits.

    python examples/train_lenet.py                             (--stock for PyTorch's own layers)
    torchrun --nproc-per-node 2 examples/train_lenet.py

SGD on batches of 128 digits, warm-up over the first 5 % of the steps, gradients clipped at norm 1.
"""

from __future__ import annotations

import digits
import torch
import training

import fastnets


def main(words: list[str] | None = None) -> None:
    parser = training.parser(__doc__.splitlines()[0], epochs=15, lr=0.1, output="lenet")
    parser.add_argument("--model", default="lenet5_relu", choices=("lenet5", "lenet5_relu"))
    options = parser.parse_args(words)
    with training.ranks(options.device) as place:
        torch.manual_seed(options.seed)
        network = fastnets.create_model(options.model, num_classes=digits.CLASSES, fused=False)
        model = training.prepare(network, options, place)
        data = digits.load(options.limit).to(place.device)
        objective = training.from_labels(options.fused)
        history = training.train(model, objective, data, options, place, options.model)
        training.save(model, history, options.output, place)


if __name__ == "__main__":
    main()
