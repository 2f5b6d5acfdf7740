"""The optimizer and the learning rate of the plain loop, as PaddleNLP's Trainer makes them."""

import paddle


def adamw(model: paddle.nn.Layer, learning_rate, weight_decay: float) -> paddle.optimizer.AdamW:
    """AdamW with betas 0.9 and 0.999; biases and weights of norms do not decay."""
    decaying = {p.name for name, p in model.named_parameters() if "bias" not in name and "norm" not in name}
    return paddle.optimizer.AdamW(
        learning_rate,
        parameters=model.parameters(),
        weight_decay=weight_decay,
        apply_decay_param_fun=decaying.__contains__,
    )


def constant_with_warmup(learning_rate: float, warmup_steps: int) -> paddle.optimizer.lr.LRScheduler:
    """A rate that rises linearly from 0 over the first steps and then stays."""
    return paddle.optimizer.lr.LambdaDecay(
        learning_rate, lambda step: min(1.0, step / warmup_steps) if warmup_steps else 1.0
    )
