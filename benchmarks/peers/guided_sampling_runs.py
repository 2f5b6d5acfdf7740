"""The flags that the programs of guided sampling share, and what is measured of it. Standard library only."""

import argparse

from timing import memory_in_use, peak_memory, print_figures, reset_peak_memory, seconds

GUIDANCE = 4.0

# Of a batch before those that are timed.
WARM_UP_STEPS = 2


def parse(description, *switches):
    """The flags common to all, and switches of a program's own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", help="of a pipeline, in the layout of the program's library")
    add("--batch-size", type=int, required=True, help="images that are drawn together")
    add("--steps", type=int, required=True, help="of DDIM")
    add("--repeats", type=int, required=True, help="batches that are timed")
    add("--device", choices=["cpu", "gpu"], required=True)
    for switch in switches:
        add(switch, action="store_true")
    return parser.parse_args()


def measure(draw, arguments, cuda=None):
    """Prints the seconds of each timed batch, and the most memory from the first batch on, loading left out.

    Args:
        draw: called with the class labels and a number of steps; draws their images.
        arguments: from `parse`.
        cuda: see `timing`.
    """
    labels = list(range(arguments.batch_size))
    memory_in_use(cuda)  # what loading has freed goes back to the system
    reset_peak_memory(cuda)
    draw(labels, WARM_UP_STEPS)
    print_figures(
        seconds=[seconds(lambda: draw(labels, arguments.steps), cuda) for _ in range(arguments.repeats)],
        peak_memory=peak_memory(cuda),
    )
