"""Reading features as fast-DiT does (its `CustomDataset`): both folders listed and sorted, two `np.load` a sample.

    python fast_dit_loading.py {open,torch,numpy} FOLDER IMAGE_SIZE [--workers N]

`torch` reads with PyTorch's `DataLoader`, shuffled; `numpy` is a plain loop that stacks the arrays, without PyTorch.
"""

import os
import random
from pathlib import Path

import numpy as np
from loading_runs import BATCH_SIZE, measure_opening, measure_reading, parse


class PairedFiles:
    """Features and labels by index."""

    def __init__(self, folder, image_size, convert=lambda array: array):
        self.folders = [folder / f"imagenet{image_size}_{kind}" for kind in ("features", "labels")]
        self.names = [sorted(os.listdir(path)) for path in self.folders]  # noqa: PTH208
        self.convert = convert

    def __len__(self):
        return len(self.names[0])

    def __getitem__(self, index):
        paths = [Path(folder, names[index]) for folder, names in zip(self.folders, self.names, strict=True)]
        return tuple(self.convert(np.load(path)) for path in paths)


def torch_epochs(arguments):
    import torch
    from torch.utils.data import DataLoader

    dataset = PairedFiles(arguments.folder, arguments.image_size, torch.from_numpy)
    loader = DataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=arguments.workers, drop_last=True)
    return (loader for _ in range(2)), len(loader)


def numpy_epochs(arguments):
    dataset = PairedFiles(arguments.folder, arguments.image_size)
    batches = len(dataset) // BATCH_SIZE

    def epoch():
        order = random.sample(range(len(dataset)), len(dataset))
        for start in range(0, batches * BATCH_SIZE, BATCH_SIZE):
            samples = [dataset[index] for index in order[start : start + BATCH_SIZE]]
            yield [np.stack(values) for values in zip(*samples, strict=True)]

    return (epoch() for _ in range(2)), batches


def main():
    arguments = parse(__doc__, "torch", "numpy")
    if arguments.what == "open":
        measure_opening(lambda: PairedFiles(arguments.folder, arguments.image_size))
    else:
        epochs = {"torch": torch_epochs, "numpy": numpy_epochs}[arguments.what]
        measure_reading(arguments.folder, *epochs(arguments))


if __name__ == "__main__":
    main()
