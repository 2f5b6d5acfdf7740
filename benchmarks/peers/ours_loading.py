"""Reading features of either layout as this project does.

    python ours_loading.py {open,training,reading} FOLDER IMAGE_SIZE [--workers N]

`training` is what trainers get: batches of the shuffled stream, with mirror, label dropout, timestep and noise drawn.
`reading` (packed only) draws nothing but the order: the stored numbers of a batch as float32 tensors, and the labels.
"""

import sys
from pathlib import Path

from loading_runs import BATCH_SIZE, measure_opening, measure_reading, parse

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from latent_diffusion import runtime  # noqa: E402
from latent_diffusion.errors import command  # noqa: E402


@command
def main() -> None:
    arguments = parse(__doc__, "training", "reading")
    runtime.start()
    from dit.configuration import DiTConfig
    from dit.features import open_features

    config = DiTConfig.from_name("DiT-S/2", arguments.image_size)
    if arguments.what == "open":
        measure_opening(lambda: open_features(arguments.folder, config))
        return
    store = open_features(arguments.folder, config)
    batches = len(store) // BATCH_SIZE
    epochs = training_epochs(store, batches, arguments.workers) if arguments.what == "training" else reading(store)
    measure_reading(arguments.folder, epochs, batches)


def training_epochs(store, batches: int, workers: int):
    """Both in one stream, so that workers start once."""
    from dit.objective import make_objective
    from latent_diffusion.features import TrainingStream
    from latent_diffusion.loader import StreamBatchSampler, TrainingLoader

    stream = TrainingStream(store, make_objective(), seed=0)
    loader = iter(TrainingLoader(stream, StreamBatchSampler(BATCH_SIZE, 0, 2 * batches), workers))
    return (loader for _ in range(2))


def reading(store):
    import numpy as np
    import paddle

    def epoch(seed: int):
        order = np.random.default_rng(seed).permutation(store.numbers)
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            numbers = order[start : start + BATCH_SIZE]
            values = store.reader.read(numbers.tolist(), [0] * BATCH_SIZE)
            yield paddle.to_tensor(values), paddle.to_tensor(store.reader.labels[numbers])

    return (epoch(seed) for seed in range(2))


if __name__ == "__main__":
    main()
