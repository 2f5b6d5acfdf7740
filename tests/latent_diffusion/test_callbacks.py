from types import SimpleNamespace

import numpy as np
import paddle

from latent_diffusion.callbacks import EvaluationCallback, ImageLoggingCallback
from latent_diffusion.ema import EMA


class Writer:
    def __init__(self):
        self.images = []

    def add_image(self, tag, image, step):
        self.images.append((tag, image, step))


def step(callback, number, model):
    state = SimpleNamespace(global_step=number, max_steps=9, is_world_process_zero=True)
    callback.on_step_end(None, state, None, model=model)


def test_the_trainer_is_asked_to_evaluate_when_it_is_due():
    callback, control = EvaluationCallback(lambda *steps: steps == (5, 9)), SimpleNamespace(should_evaluate=False)
    asked = []
    for number in (4, 5, 6):
        callback.on_step_end(None, SimpleNamespace(global_step=number, max_steps=9), control)
        asked.append(control.should_evaluate)
    assert asked == [False, True, False]


def test_images_are_drawn_with_the_averaged_weights():
    model = paddle.nn.Linear(2, 2)
    ema = EMA(model)
    average = model.weight.numpy().copy()
    model.weight.set_value(model.weight + 1.0)
    writer = Writer()
    drawn = lambda net: {"grid": net.weight.numpy().copy()}  # noqa: E731
    callback = ImageLoggingCallback(drawn, lambda step, last: step == 5, ema, SimpleNamespace(vdl_writer=writer))
    for number in (4, 5, 6):
        step(callback, number, model)
    ((tag, image, number),) = writer.images
    assert (tag, number) == ("samples/grid", 5)
    np.testing.assert_array_equal(image, average)
    np.testing.assert_array_equal(model.weight.numpy(), average + 1.0)


def test_a_failure_to_draw_is_said_once_and_does_not_end_the_run(capsys):
    def fail(model):
        raise MemoryError("no room")

    callback = ImageLoggingCallback(fail, lambda step, last: True, None, SimpleNamespace(vdl_writer=Writer()))
    for number in (1, 2, 3):
        step(callback, number, paddle.nn.Linear(2, 2))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "warning: no more images are logged: MemoryError: no room"
